//! The local HTTP API: JSON on `<state>/admin.sock`, root only.
//!
//! `GET /v1/status`, `GET /v1/snapshots`, `GET /metrics` and `GET /healthz` are served by the
//! frame; drivers register more through [`Routes`] (`/v1/layers`). Nothing here is part of the
//! path between a container and its files.

mod routes;
mod server;

pub use self::{
    routes::{Answer, Query, Request, Routes},
    server::{Server, ServerError},
};
