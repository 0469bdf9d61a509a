//! Reads requests and answers them.
