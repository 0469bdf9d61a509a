//! The admin routes of lazy layers.

use std::{fmt::Display, sync::Arc};

use formats::digest::Digest;
use http::{Method, StatusCode};

use crate::{
    admin::{Answer, Routes},
    layers::Layers,
    logging,
};

const LAYERS: &str = "/v1/layers/";
const TOUCHED: &str = "/touched";

pub(super) fn register(routes: &Routes, layers: &Arc<Layers>) {
    let this = Arc::clone(layers);
    routes.add(Method::GET, "/v1/layers", move |_| {
        let layers = Arc::clone(&this);
        async move {
            match layers.list() {
                Ok(value) => Answer::json(&value),
                Err(error) => internal(logging::chain(&error)),
            }
        }
    });

    let this = Arc::clone(layers);
    routes.add(Method::GET, LAYERS, move |request| {
        let layers = Arc::clone(&this);
        async move {
            let digest = request
                .path
                .strip_prefix(LAYERS)
                .and_then(|rest| rest.strip_suffix(TOUCHED))
                .and_then(|digest| digest.parse::<Digest>().ok());
            let Some(digest) = digest else {
                return bad("the path is /v1/layers/sha256:<64 hex digits>/touched");
            };
            match layers.touched(digest).await {
                Ok(Some(value)) => Answer::json(&value),
                Ok(None) => Answer::error(StatusCode::NOT_FOUND, format!("no lazy layer {digest}")),
                Err(error) => internal(error),
            }
        }
    });

    let this = Arc::clone(layers);
    routes.add(Method::GET, "/v1/images", move |request| {
        let layers = Arc::clone(&this);
        async move {
            let Some(reference) = request.query.value("ref") else {
                return bad("name an image: ?ref=REFERENCE");
            };
            match layers.image(reference) {
                Ok(Some(value)) => Answer::json(&value),
                Ok(None) => Answer::error(
                    StatusCode::NOT_FOUND,
                    format!("no layer of {reference} was announced to this daemon"),
                ),
                Err(error) => internal(logging::chain(&error)),
            }
        }
    });

    let this = Arc::clone(layers);
    routes.add(Method::GET, "/v1/why", move |_| {
        let answer = Answer::json(&this.why());
        async move { answer }
    });

    let this = Arc::clone(layers);
    routes.add(Method::POST, "/v1/hydrate", move |request| {
        let layers = Arc::clone(&this);
        async move {
            let digest = match request.query.value("layer").map(str::parse::<Digest>) {
                None => None,
                Some(Ok(digest)) => Some(digest),
                Some(Err(error)) => return bad(error),
            };
            let image = request.query.value("ref");
            match layers.hydrate_and_wait(digest, image).await {
                Ok(value) => Answer::json(&value),
                Err(error) => internal(error),
            }
        }
    });
}

fn bad(message: impl Display) -> Answer {
    Answer::error(StatusCode::BAD_REQUEST, message)
}

fn internal(message: impl Display) -> Answer {
    Answer::error(StatusCode::INTERNAL_SERVER_ERROR, message)
}
