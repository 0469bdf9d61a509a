//! The control endpoints under `/_lab/`: what [`Handle`](crate::Handle) does, for other processes.

use std::{sync::Arc, time::Duration};

use http::{Method, StatusCode};
use hyper::body::Incoming;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

use super::{Ask, method_not_allowed, uploads::collect};
use crate::{
    connection::{Connection, Port},
    link::LinkModel,
    log::{Marker, Totals},
    reply::Reply,
    rules::{Rule, RuleId},
    server::Shared,
};

pub(super) async fn answer(
    shared: &Arc<Shared>,
    connection: &Connection,
    ask: &Ask<'_>,
    path: &str,
    body: Incoming,
) -> Reply {
    if shared.options.admin.is_none() {
        return unknown();
    }
    let body = match collect(connection, body, 1 << 20).await {
        Ok(body) => body,
        Err(reply) => return reply,
    };
    act(shared, connection.port, ask, path, &body)
        .await
        .unwrap_or_else(|error| error)
}

async fn act(
    shared: &Arc<Shared>,
    port: Port,
    ask: &Ask<'_>,
    path: &str,
    body: &[u8],
) -> Result<Reply, Reply> {
    let segments: Vec<_> = path.split('/').collect();
    match (ask.method, segments.as_slice()) {
        (&Method::GET, ["info"]) => Ok(ok(&info(shared))),
        (&Method::GET, ["rules"]) => Ok(ok(&shared.rules.list())),
        (&Method::POST, ["rules"]) => {
            let rule: Rule = parse(body)?;
            Ok(ok(&json!({ "id": shared.rules.add(rule) })))
        }
        (&Method::DELETE, ["rules"]) => {
            shared.rules.clear();
            Ok(done())
        }
        (&Method::DELETE, ["rules", id]) => {
            let id = id.parse().map(RuleId).map_err(|_| unknown())?;
            if shared.rules.remove(id) {
                Ok(done())
            } else {
                Err(unknown())
            }
        }
        (&Method::GET, ["log"]) => {
            let since: u64 = match ask.query.first("since") {
                Some(text) => text.parse().map_err(|_| bad("since is not a number"))?,
                None => 0,
            };
            let mut entries = shared.log.entries();
            entries.retain(|entry| entry.index >= since);
            Ok(ok(&entries))
        }
        (&Method::POST, ["mark"]) => Ok(ok(&shared.log.mark())),
        (&Method::GET | &Method::POST, ["totals"]) => {
            let marker: Marker = if body.is_empty() {
                Marker::default()
            } else {
                parse(body)?
            };
            let totals: Totals = shared.log.totals_since(&marker);
            Ok(ok(&totals))
        }
        (&Method::PUT, ["link"]) => {
            let link: Option<LinkBody> = parse(body)?;
            let link = match link {
                None => None,
                Some(LinkBody::Model(model)) => Some(model),
                Some(LinkBody::Name(name)) => {
                    let model = name.parse::<LinkModel>();
                    Some(model.map_err(|error| bad(&error.to_string()))?)
                }
            };
            shared.set_link(link);
            Ok(done())
        }
        (&Method::POST, ["gone" | "back"]) if port != Port::Admin => Err(Reply::error(
            StatusCode::CONFLICT,
            "UNSUPPORTED",
            "ask for that at the control port, which stays",
        )),
        (&Method::POST, ["gone"]) => {
            let gone: Gone = if body.is_empty() {
                Gone::default()
            } else {
                parse(body)?
            };
            shared.set_present(false).await;
            if let Some(ms) = gone.for_ms {
                let shared = shared.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    shared.set_present(true).await;
                });
            }
            Ok(done())
        }
        (&Method::POST, ["back"]) => {
            shared.set_present(true).await;
            Ok(done())
        }
        (&Method::POST, ["tokens", "revoke"]) => {
            shared.authority.revoke_all();
            Ok(done())
        }
        (
            _,
            ["info" | "rules" | "log" | "mark" | "totals" | "link" | "gone" | "back"]
            | ["rules", _]
            | ["tokens", "revoke"],
        ) => Err(method_not_allowed()),
        _ => Err(unknown()),
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum LinkBody {
    Name(String),
    Model(LinkModel),
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gone {
    for_ms: Option<u64>,
}

fn info(shared: &Shared) -> serde_json::Value {
    json!({
        "url": format!("{}://{}", shared.scheme(), shared.main),
        "storage": shared.storage,
        "admin": shared.admin,
        "dir": shared.store.root(),
        "link": shared.link(),
        "ca_pem": shared.ca_pem(),
        "token_requests": shared.authority.token_requests(),
    })
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Reply> {
    serde_json::from_slice(body).map_err(|error| bad(&error.to_string()))
}

fn ok(value: &impl serde::Serialize) -> Reply {
    Reply::json(StatusCode::OK, value)
}

fn done() -> Reply {
    Reply::empty(StatusCode::NO_CONTENT)
}

fn bad(message: &str) -> Reply {
    Reply::error(StatusCode::BAD_REQUEST, "INVALID", message)
}

fn unknown() -> Reply {
    Reply::error(StatusCode::NOT_FOUND, "UNKNOWN", "no such control")
}
