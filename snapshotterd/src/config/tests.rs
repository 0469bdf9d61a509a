use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, &Overrides::default())
}

#[test]
fn nothing_is_needed() -> Result<(), ConfigError> {
    let config = parse("")?;
    assert_eq!(
        config.address,
        Path::new("/run/snapshotterd/snapshotterd.sock")
    );
    assert_eq!(config.driver_of("anything"), Some(DriverKind::Lazy));
    Ok(())
}

#[test]
fn what_is_dumped_is_read_back() -> Result<(), ConfigError> {
    let config = parse(
        "default_driver = \"none\"\nrpc_timeout = \"12s\"\n[snapshotters.fast]\ndriver = \"overlayfs\"\n",
    )?;
    assert_eq!(config.driver_of("fast"), Some(DriverKind::Overlayfs));
    assert_eq!(config.driver_of("other"), None);
    assert_eq!(parse(&config.dump()?)?, config);
    Ok(())
}

#[test]
fn flags_win_and_the_socket_follows_the_state() -> Result<(), ConfigError> {
    let overrides = Overrides {
        state: Some("/run/other".into()),
        log_level: Some("debug".to_owned()),
        ..Overrides::default()
    };
    let config = Config::parse("state = \"/run/file\"", &overrides)?;
    assert_eq!(config.address, Path::new("/run/other/snapshotterd.sock"));
    assert_eq!(config.log.level, "debug");
    Ok(())
}

#[test]
fn errors_name_key_and_line() {
    for (text, expected) in [
        ("rot = \"/x\"", "configuration:1: unknown field `rot`"),
        ("\n[log]\nlevel = 3", "configuration:3: invalid type"),
        (
            "root = \"relative\"",
            "configuration:1: root: must be an absolute path",
        ),
        (
            "\n\nlowers = \"/run/a,b\"",
            "configuration:3: lowers: must not contain ','",
        ),
        ("[log]\n\nlevel = \"info,=\"", "configuration:3: log.level:"),
        (
            "rpc_timeout = \"5m\"",
            "configuration:1: rpc_timeout: allowed are 1s to 60s",
        ),
        (
            "[lazy]\nresolve_timeout = \"10s\"",
            "configuration:2: lazy.resolve_timeout:",
        ),
        (
            "[metrics]\naddress = \"here\"",
            "configuration:2: metrics.address:",
        ),
        (
            "[overlayfs]\nmount_options = [\"lowerdir=/\"]",
            "configuration:2: overlayfs.mount_options:",
        ),
        (
            "[snapshotters.x]\ndriver = \"zfs\"",
            "configuration:2: unknown variant",
        ),
    ] {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.starts_with(expected), "{text:?}: {error}");
    }
}

/// docs/config.md is written by hand; this holds it to the structs: every key with its default.
#[test]
fn every_key_is_documented_with_its_default() -> Result<(), Box<dyn std::error::Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/config.md");
    let document = fs::read_to_string(&path)?;
    let defaults: toml::Table = toml::from_str(&parse("")?.dump()?)?;
    let mut missing = Vec::new();
    let mut check = |key: String, value: &toml::Value| {
        let row = format!("| `{key}` | `{value}` |");
        if !document.contains(&row) {
            missing.push(row);
        }
    };
    for (key, value) in &defaults {
        match value {
            toml::Value::Table(section) => {
                for (name, value) in section {
                    check(format!("{key}.{name}"), value);
                }
            }
            value => check(key.clone(), value),
        }
    }
    assert!(
        missing.is_empty(),
        "docs/config.md lacks:\n{}",
        missing.join("\n")
    );
    Ok(())
}

/// The snippets under deploy/ name what the defaults are.
#[test]
fn containerd_snippets_agree_with_the_defaults() -> Result<(), Box<dyn std::error::Error>> {
    let config = parse("")?;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/containerd");
    for (file, version) in [("1.6.toml", 2), ("2.3.toml", 3), ("2.4.toml", 3)] {
        let snippet: toml::Table = toml::from_str(&fs::read_to_string(directory.join(file))?)?;
        assert_eq!(snippet["version"].as_integer(), Some(version), "{file}");
        let plugin = &snippet["proxy_plugins"]["snapshotterd"];
        assert_eq!(plugin["type"].as_str(), Some("snapshot"), "{file}");
        assert_eq!(
            plugin["address"].as_str(),
            config.address.to_str(),
            "{file}"
        );
        let images = if version == 2 {
            &snippet["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
        } else {
            let exports = &plugin["exports"];
            assert_eq!(exports["root"].as_str(), config.root.to_str(), "{file}");
            let annotations = exports["enable_remote_snapshot_annotations"].as_str();
            assert_eq!(annotations, Some("true"), "{file}");
            &snippet["plugins"]["io.containerd.cri.v1.images"]
        };
        assert_eq!(
            images["snapshotter"].as_str(),
            Some("snapshotterd"),
            "{file}"
        );
        let hidden = images["disable_snapshot_annotations"].as_bool();
        assert_eq!(hidden, Some(false), "{file}");
    }
    Ok(())
}
