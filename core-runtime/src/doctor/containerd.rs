//! containerd: is the daemon registered, and does containerd tell it what it needs?
//!
//! Everything here degrades silently in containerd: images are pulled as ever, only not lazily.

use std::fs;

use snapshotterd::api::{
    introspection::{Plugin, PluginsRequest, introspection_client::IntrospectionClient},
    version::version_client::VersionClient,
};
use toml::{Table, Value};
use tonic::transport::{Channel, Endpoint};

use super::{Check, Places};

const SNAPSHOTTER: &str = "io.containerd.snapshotter.v1";
const TRANSFER: &str = "io.containerd.transfer.v1.local";
const CRI_1: &str = "io.containerd.grpc.v1.cri";
const CRI_IMAGES: &str = "io.containerd.cri.v1.images";

pub(super) async fn examine(places: &Places) -> Vec<Check> {
    const NAME: &str = "containerd";
    let uri = format!("unix://{}", places.containerd.display());
    let connected = match Endpoint::from_shared(uri) {
        Ok(endpoint) => endpoint.connect().await,
        Err(error) => Err(error),
    };
    let Ok(channel) = connected else {
        let found = format!("nobody listens on {}", places.containerd.display());
        let fix = "start it, or name its socket with --containerd; snapctl run needs none";
        return vec![Check::warning(NAME, found, fix)];
    };
    let mut checks = Vec::new();
    let version = match VersionClient::new(channel.clone()).version(()).await {
        Ok(answer) => answer.into_inner().version,
        Err(status) => return vec![Check::unknown(NAME, status.message().to_owned())],
    };
    let line = line(&version);
    checks.push(Check::good(NAME, version.clone()));
    checks.extend(registration(places, channel, line).await);
    match fs::read_to_string(&places.containerd_config) {
        Ok(text) => match text.parse::<Table>() {
            Ok(config) => checks.extend(configuration(places, &config, line)),
            Err(error) => {
                checks.push(Check::unknown(
                    "containerd config",
                    format!("{}: {error}", places.containerd_config.display()),
                ));
            }
        },
        Err(error) => {
            let found = format!("{}: {error}", places.containerd_config.display());
            checks.push(Check::unknown("containerd config", found));
        }
    }
    checks
}

/// `(major, minor)`; development versions count as new.
fn line(version: &str) -> (u32, u32) {
    let mut parts = version.trim_start_matches('v').split('.').map(|part| {
        part.chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
            .parse()
            .ok()
    });
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor),
        _ => (u32::MAX, 0),
    }
}

fn snippet(places: &Places, line: (u32, u32)) -> String {
    let exports = if line >= (2, 1) {
        "\n    [proxy_plugins.snapshotterd.exports]\n      enable_remote_snapshot_annotations = \"true\""
    } else {
        ""
    };
    format!(
        "add to {}:\n  [proxy_plugins.snapshotterd]\n    type = \"snapshot\"\n    address = {:?}{exports}",
        places.containerd_config.display(),
        places.address.display().to_string(),
    )
}

async fn registration(places: &Places, channel: Channel, line: (u32, u32)) -> Vec<Check> {
    const NAME: &str = "plugin registration";
    let request = PluginsRequest {
        filters: vec![format!("type=={SNAPSHOTTER}")],
    };
    let plugins = match IntrospectionClient::new(channel).plugins(request).await {
        Ok(answer) => answer.into_inner().plugins,
        Err(status) => return vec![Check::unknown(NAME, status.message().to_owned())],
    };
    let address = places.address.display().to_string();
    let ours = |plugin: &&Plugin| {
        plugin
            .exports
            .get("address")
            .is_some_and(|at| at.trim_start_matches("unix://") == address)
    };
    let found: Vec<_> = plugins.iter().filter(ours).collect();
    // 1.6 exports no address: the usual name has to do.
    let found = if found.is_empty() {
        plugins
            .iter()
            .filter(|plugin| plugin.id == "snapshotterd")
            .collect()
    } else {
        found
    };
    if found.is_empty() {
        let names: Vec<_> = plugins.iter().map(|plugin| plugin.id.as_str()).collect();
        return vec![Check::bad(
            NAME,
            format!("not among containerd's snapshotters: {}", names.join(", ")),
            snippet(places, line),
        )];
    }
    let mut checks = Vec::new();
    for plugin in found {
        checks.push(match &plugin.init_err {
            Some(error) => Check::bad(
                NAME,
                format!("{}: {}", plugin.id, error.message),
                snippet(places, line),
            ),
            None => Check::good(NAME, format!("as {:?}", plugin.id)),
        });
        checks.push(annotations_export(plugin, line));
        let rebase = plugin.capabilities.iter().any(|name| name == "rebase");
        if rebase && (line == (2, 2) || line == (2, 3)) {
            checks.push(Check::bad(
                "rebase capability",
                format!(
                    "{:?} advertises rebase: on containerd {}.{} lazy answers are then impossible",
                    plugin.id, line.0, line.1
                ),
                format!(
                    "remove \"rebase\" from proxy_plugins.{}.capabilities",
                    plugin.id
                ),
            ));
        }
    }
    checks
}

fn annotations_export(plugin: &Plugin, line: (u32, u32)) -> Check {
    const NAME: &str = "annotations export";
    if line < (2, 1) {
        return Check::good(NAME, "not needed before containerd 2.1");
    }
    match plugin
        .exports
        .get("enable_remote_snapshot_annotations")
        .map(String::as_str)
    {
        Some("true") => Check::good(NAME, "enable_remote_snapshot_annotations = \"true\""),
        other => Check::bad(
            NAME,
            format!(
                "enable_remote_snapshot_annotations is {}",
                other.unwrap_or("not set")
            ),
            format!(
                "without it pulls through the transfer service name no layers; add:\n  \
                 [proxy_plugins.{}.exports]\n    enable_remote_snapshot_annotations = \"true\"",
                plugin.id
            ),
        ),
    }
}

fn configuration(places: &Places, config: &Table, line: (u32, u32)) -> Vec<Check> {
    let ours = names(places, config);
    let plugin = |name: &str| config.get("plugins").and_then(|plugins| plugins.get(name));
    let mut checks = Vec::new();
    if line >= (2, 1) {
        checks.push(unpack_config(plugin(TRANSFER), &ours));
    }
    if line < (2, 0) {
        let containerd = plugin(CRI_1).and_then(|cri| cri.get("containerd"));
        checks.push(cri(
            containerd,
            &ours,
            CRI_1,
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd]",
            true,
        ));
    } else {
        checks.push(cri(
            plugin(CRI_IMAGES),
            &ours,
            CRI_IMAGES,
            "[plugins.\"io.containerd.cri.v1.images\"]",
            false,
        ));
    }
    checks
}

/// Names under which the daemon is registered in the config file.
fn names(places: &Places, config: &Table) -> Vec<String> {
    let address = places.address.display().to_string();
    let plugins = config.get("proxy_plugins").and_then(Value::as_table);
    let ours = plugins.into_iter().flatten().filter(|(_, plugin)| {
        plugin
            .get("address")
            .and_then(Value::as_str)
            .is_some_and(|at| at.trim_start_matches("unix://") == address)
    });
    ours.map(|(name, _)| name.clone()).collect()
}

fn unpack_config(transfer: Option<&Value>, ours: &[String]) -> Check {
    const NAME: &str = "unpack_config";
    let entries = transfer
        .and_then(|transfer| transfer.get("unpack_config"))
        .and_then(Value::as_array);
    let listed = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.get("snapshotter")?.as_str());
    let listed: Vec<_> = listed.collect();
    let name = ours.first().map_or("snapshotterd", String::as_str);
    if listed
        .iter()
        .any(|listed| ours.iter().any(|ours| ours == listed))
    {
        return Check::good(NAME, format!("lists {name:?}"));
    }
    Check::bad(
        NAME,
        format!("the transfer service does not know snapshotter {name:?}"),
        format!(
            "`ctr images pull --snapshotter {name}` and CRI pulls fail or ignore it; setting the key replaces the \
             defaults, so list both:\n  [[plugins.\"{TRANSFER}\".unpack_config]]\n    platform = \"linux/amd64\"\n    \
             snapshotter = \"overlayfs\"\n    differ = \"walking\"\n  [[plugins.\"{TRANSFER}\".unpack_config]]\n    \
             platform = \"linux/amd64\"\n    snapshotter = \"{name}\"\n    differ = \"walking\""
        ),
    )
}

fn cri(
    section: Option<&Value>,
    ours: &[String],
    plugin: &str,
    heading: &str,
    needs_annotations: bool,
) -> Check {
    const NAME: &str = "CRI";
    let name = ours.first().map_or("snapshotterd", String::as_str);
    let snapshotter = section
        .and_then(|section| section.get("snapshotter"))
        .and_then(Value::as_str);
    if !snapshotter.is_some_and(|used| ours.iter().any(|ours| ours == used)) {
        let used = snapshotter.unwrap_or("overlayfs (the default)");
        return Check::warning(
            NAME,
            format!("Kubernetes pods use {used}"),
            format!("to start pods lazily:\n  {heading}\n    snapshotter = \"{name}\""),
        );
    }
    let flag = |key: &str| {
        section
            .and_then(|section| section.get(key))
            .and_then(Value::as_bool)
    };
    if flag("discard_unpacked_layers") == Some(true) {
        return Check::warning(
            NAME,
            "discard_unpacked_layers = true makes CRI pull without the transfer service",
            format!(
                "remove discard_unpacked_layers from {heading}: lazily served layers are not kept twice anyway"
            ),
        );
    }
    if needs_annotations && flag("disable_snapshot_annotations") != Some(false) {
        return Check::bad(
            NAME,
            "snapshot annotations are disabled, so no layer can be found in its registry",
            format!("{heading}\n    disable_snapshot_annotations = false"),
        );
    }
    Check::good(NAME, format!("pods use {name:?} ({plugin})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    fn places() -> Places {
        Places {
            address: "/run/s.sock".into(),
            admin: "/run/a.sock".into(),
            containerd: "/run/c.sock".into(),
            containerd_config: "/etc/containerd/config.toml".into(),
        }
    }

    fn outcomes(config: &str, line: (u32, u32)) -> Vec<(&'static str, Outcome)> {
        let config = config.parse().unwrap();
        configuration(&places(), &config, line)
            .into_iter()
            .map(|check| (check.name, check.outcome))
            .collect()
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(line("1.6.20~ds1"), (1, 6));
        assert_eq!(line("v2.4.2"), (2, 4));
        assert_eq!(line("unknown"), (u32::MAX, 0));
    }

    #[test]
    fn each_silent_degradation_is_found() {
        let registered = "[proxy_plugins.lazy]\ntype=\"snapshot\"\naddress=\"/run/s.sock\"\n";
        assert_eq!(
            outcomes(registered, (2, 4)),
            [("unpack_config", Outcome::Bad), ("CRI", Outcome::Warning)]
        );
        let good = format!(
            "{registered}[[plugins.\"{TRANSFER}\".unpack_config]]\nsnapshotter=\"lazy\"\n\
             [plugins.\"{CRI_IMAGES}\"]\nsnapshotter=\"lazy\"\n"
        );
        assert_eq!(
            outcomes(&good, (2, 4)),
            [("unpack_config", Outcome::Good), ("CRI", Outcome::Good)]
        );
        let old = format!("{registered}[plugins.\"{CRI_1}\".containerd]\nsnapshotter=\"lazy\"\n");
        assert_eq!(outcomes(&old, (1, 6)), [("CRI", Outcome::Bad)]);
        let fixed = format!("{old}disable_snapshot_annotations=false\n");
        assert_eq!(outcomes(&fixed, (1, 6)), [("CRI", Outcome::Good)]);
    }
}
