//! Checks a machine for everything lazy starts need, and says what to change.

mod containerd;
mod kernel;

use std::path::PathBuf;

use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should be.
    Good,
    /// Works, but not as well as it could.
    Warning,
    /// Lazy starts do not work because of this.
    Bad,
    /// Could not be checked.
    Unknown,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do, where something is to be done.
    pub fix: Option<String>,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Good,
            found: found.into(),
            fix: None,
        }
    }

    fn unknown(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Unknown,
            found: found.into(),
            fix: None,
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Warning,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    fn bad(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Bad,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }
}

/// Where to look.
#[derive(Clone, Debug)]
pub struct Places {
    /// The daemon's gRPC socket.
    pub address: PathBuf,
    /// The daemon's admin socket.
    pub admin: PathBuf,
    /// containerd's gRPC socket.
    pub containerd: PathBuf,
    /// containerd's config file.
    pub containerd_config: PathBuf,
}

/// Runs every check.
pub async fn examine(places: &Places) -> Vec<Check> {
    let mut checks = kernel::examine();
    checks.push(daemon(places).await);
    checks.extend(presenter(places).await);
    checks.extend(containerd::examine(places).await);
    checks
}

async fn daemon(places: &Places) -> Check {
    const NAME: &str = "snapshotterd";
    match tokio::net::UnixStream::connect(&places.address).await {
        Ok(_) => Check::good(NAME, format!("listens on {}", places.address.display())),
        Err(error) => Check::bad(
            NAME,
            format!("{}: {error}", places.address.display()),
            "start it: systemctl start snapshotterd (or name its socket with --address)",
        ),
    }
}

/// What the running daemon found out with real mounts when it started.
async fn presenter(places: &Places) -> Vec<Check> {
    const NAME: &str = "stacking";
    let status = match crate::admin::get(&places.admin, "/v1/status").await {
        Ok(status) => status,
        Err(error) => {
            return vec![Check::unknown(
                NAME,
                format!("the daemon cannot be asked: {error:#}"),
            )];
        }
    };
    let Some(probe) = status.get("probe").and_then(serde_json::Value::as_object) else {
        return vec![Check::unknown(
            NAME,
            "the daemon has not probed this kernel",
        )];
    };
    let mut problems = Vec::new();
    for (what, finding) in probe.iter().filter(|(what, _)| what.as_str() != DIRECT_IO) {
        if finding.as_str() != Some("works") {
            let finding = finding
                .as_str()
                .map_or_else(|| finding.to_string(), str::to_owned);
            problems.push(format!("{what}: {finding}"));
        }
    }
    let stacking = if problems.is_empty() {
        Check::good(
            NAME,
            "EROFS on FUSE under two overlays works; signalled and killed readers behave",
        )
    } else {
        Check::bad(
            NAME,
            problems.join("; "),
            "layers are unpacked by containerd until this works: use a kernel from 6.12 on",
        )
    };
    vec![stacking, direct_reads(probe.get(DIRECT_IO))]
}

/// What `/v1/status` calls the finding about direct I/O.
const DIRECT_IO: &str = "direct_io";

fn direct_reads(finding: Option<&serde_json::Value>) -> Check {
    const NAME: &str = "direct reads";
    match finding.and_then(serde_json::Value::as_str) {
        Some("works") => Check::good(
            NAME,
            "complete layers are read past the page cache of their files",
        ),
        Some(finding) => Check::warning(
            NAME,
            finding,
            "nothing has to be done: complete layers are read through the page cache, which may \
             hold them twice",
        ),
        None => Check::unknown(NAME, "the daemon has not tried"),
    }
}
