//! What is claimed and what is proven about a layer.
