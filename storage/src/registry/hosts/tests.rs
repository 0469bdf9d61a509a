use proptest::prelude::*;

use super::*;

fn parsed(text: &str, registry: &str) -> Vec<HostConfig> {
    parse(text, Path::new("/certs.d/x/hosts.toml"), &[], registry)
        .unwrap_or_else(|error| panic!("{}", crate::ranges::report(&error)))
}

fn refused(text: &str) -> String {
    let error = parse(text, Path::new("/certs.d/x/hosts.toml"), &[], "x.io").expect_err(text);
    crate::ranges::report(&error)
}

fn paths(files: &[StampedFile]) -> Vec<&str> {
    files
        .iter()
        .map(|file| file.path.to_str().unwrap())
        .collect()
}

#[test]
fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
    let hosts = parsed(
        r#"
        server = "https://x.io"
        ca = "root.crt"

        [host."https://zeta.example"]
        capabilities = ["pull", "resolve"]
        ca = ["a.crt", "/abs/b.crt"]
        client = [["c.cert", "c.key"], "both.pem"]
        dial_timeout = "1m1.5s"
          [host."https://zeta.example".header]
          x-one = "1"
          x-many = ["2", "3"]

        [host."http://alpha.example:8080/some/path"]
        capabilities = ["PULL"]

        [host."https://middle.example/v2/proxy"]
        override_path = true
        skip_verify = true

        [host."beta.example:5000"]
        client = "pair.pem"
        "#,
        "x.io",
    );
    let authorities: Vec<_> = hosts.iter().map(|host| host.authority.as_str()).collect();
    assert_eq!(
        authorities,
        [
            "zeta.example",
            "alpha.example:8080",
            "middle.example",
            "beta.example:5000",
            "x.io"
        ]
    );
    let [zeta, alpha, middle, beta, server] = &hosts[..] else {
        panic!()
    };
    assert_eq!(
        zeta.capabilities,
        Capabilities {
            pull: true,
            resolve: true,
            push: false
        }
    );
    assert_eq!(paths(&zeta.tls.ca), ["/certs.d/x/a.crt", "/abs/b.crt"]);
    assert_eq!(zeta.tls.client.len(), 2);
    assert_eq!(
        zeta.tls.client[0].1.as_ref().unwrap().path,
        Path::new("/certs.d/x/c.key")
    );
    assert!(zeta.tls.client[1].1.is_none());
    assert_eq!(zeta.dial_timeout, Some(Duration::from_millis(61_500)));
    assert_eq!(zeta.headers.get_all("X-Many").iter().count(), 2);
    assert!(
        !format!("{:?}", zeta.headers).contains('3'),
        "headers may be secret"
    );
    assert!(zeta.is_mirror_of("x.io"));
    assert_eq!(alpha.scheme, Scheme::Http);
    assert_eq!(alpha.path, "/some/path/v2");
    assert_eq!(
        alpha.capabilities,
        Capabilities {
            pull: true,
            ..Default::default()
        }
    );
    assert_eq!(middle.path, "/v2/proxy");
    assert!(middle.tls.skip_verify);
    assert_eq!(beta.scheme, Scheme::Https);
    assert_eq!(beta.tls.client.len(), 1);
    assert_eq!(
        (server.path.as_str(), server.scheme),
        ("/v2", Scheme::Https)
    );
    assert_eq!(paths(&server.tls.ca), ["/certs.d/x/root.crt"]);
    assert!(!server.is_mirror_of("x.io"));
}

#[test]
fn without_a_server_the_registry_itself_comes_last() {
    let hosts = parsed("[host.\"http://m.example\"]\n", "docker.io");
    assert_eq!(hosts[1].authority, "registry-1.docker.io");
    assert!(!hosts[1].is_mirror_of("docker.io"));
    let hosts = parsed("skip_verify = true\n", "y.io:5000");
    assert_eq!(hosts.len(), 1);
    assert_eq!(hosts[0].authority, "y.io:5000");
    assert!(hosts[0].tls.skip_verify);
}

#[test]
fn plain_http_with_tls_files_is_tried_with_tls_first() {
    let host = |text| parsed(text, "x.io").remove(0);
    assert_eq!(
        host("[host.\"http://m.example:5000\"]\nskip_verify = true").scheme,
        Scheme::HttpsThenHttp
    );
    assert_eq!(
        host("[host.\"http://m.example:80\"]\nca = 'x'").scheme,
        Scheme::Http
    );
    assert_eq!(
        host("[host.\"http://m.example:5000\"]").scheme,
        Scheme::Http
    );
}

#[test]
fn hosts_without_configuration_follow_containerd() {
    let default = |registry: &str, plain: &[String]| load(&[], plain, registry).unwrap().remove(0);
    for (registry, scheme, skip_verify) in [
        ("docker.io", Scheme::Https, false),
        ("ghcr.io", Scheme::Https, false),
        ("10.0.0.1:5000", Scheme::Https, false),
        ("localhost", Scheme::Https, true),
        ("localhost:443", Scheme::Https, true),
        ("localhost:80", Scheme::Http, true),
        ("127.0.0.1:5000", Scheme::HttpThenHttps, true),
        ("127.1.2.3:5000", Scheme::HttpThenHttps, true),
        ("[::1]:5000", Scheme::HttpThenHttps, true),
        ("localhost.example:5000", Scheme::Https, false),
    ] {
        let host = default(registry, &[]);
        assert_eq!(host.scheme, scheme, "{registry}");
        assert_eq!(host.tls.skip_verify, skip_verify, "{registry}");
        assert_eq!(host.path, "/v2");
    }
    assert_eq!(default("docker.io", &[]).authority, "registry-1.docker.io");
    let plain = ["10.0.0.1:5000".to_owned(), "lab".to_owned()];
    assert_eq!(default("10.0.0.1:5000", &plain).scheme, Scheme::Http);
    assert_eq!(default("10.0.0.1:5001", &plain).scheme, Scheme::Https);
    assert_eq!(default("lab:1", &plain).scheme, Scheme::Http);
}

#[test]
fn directories_are_looked_for_as_containerd_does() {
    let root = tempfile::tempdir().unwrap();
    let dirs = [root.path().join("missing"), root.path().to_owned()];
    let write = |dir: &str, server: &str| {
        let dir = root.path().join(dir);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), format!("server = \"{server}\"")).unwrap();
    };
    let server = |registry: &str| load(&dirs, &[], registry).unwrap().remove(0).authority;
    assert_eq!(server("x.io:5000"), "x.io:5000");
    write("_default", "https://default.example");
    assert_eq!(server("x.io:5000"), "default.example");
    write("x.io:5000", "https://colon.example");
    assert_eq!(server("x.io:5000"), "colon.example");
    write("x.io_5000_", "https://underscore.example");
    assert_eq!(server("x.io:5000"), "underscore.example");
    assert_eq!(server("y.io"), "default.example");
}

#[test]
fn docker_certificate_directories_are_understood() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("x.io");
    std::fs::create_dir(&dir).unwrap();
    for name in ["ca.crt", "a.cert", "a.key", "b.cert", "other.txt"] {
        std::fs::write(dir.join(name), "").unwrap();
    }
    let host = load(&[root.path().to_owned()], &[], "x.io")
        .unwrap()
        .remove(0);
    assert_eq!(paths(&host.tls.ca), [dir.join("ca.crt").to_str().unwrap()]);
    let client = &host.tls.client;
    assert_eq!(client.len(), 2);
    assert!(client[0].1.as_ref().unwrap().path.ends_with("a.key"));
    assert!(client[1].1.is_none());
    let before = host.tls;
    std::fs::write(dir.join("ca.crt"), "renewed").unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(dir.join("ca.crt"))
        .unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let after = load(&[root.path().to_owned()], &[], "x.io")
        .unwrap()
        .remove(0)
        .tls;
    assert_ne!(before, after, "a renewed certificate must be noticed");
}

#[test]
fn what_makes_no_sense_is_refused_with_the_file_and_the_value() {
    for (text, expected) in [
        ("server = 1", "hosts.toml"),
        ("server = [", "hosts.toml"),
        (
            "capabilities = [\"fly\"]\nserver = \"x\"",
            "unknown capability \"fly\"",
        ),
        ("server = \"https://\"", "not a URL"),
        ("server = \"https://u:p@x.io\"", "credentials"),
        ("server = \"httpx://x.io\"", "neither http nor https"),
        ("ca = 3", "hosts.toml"),
        ("client = [[\"a\"]]", "where a pair belongs"),
        ("dial_timeout = \"5\"", "is not a duration"),
        ("dial_timeout = \"-5s\"", "is not a duration"),
        ("[header]\n\"a b\" = \"c\"", "not a header name"),
        ("[header]\na = \"\\n\"", "forbidden characters"),
    ] {
        let message = refused(text);
        assert!(message.contains(expected), "{text}: {message}");
        assert!(message.contains("hosts.toml"), "{text}: {message}");
    }
}

#[test]
fn loads_report_unreadable_and_oversized_files() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("x.io");
    std::fs::create_dir_all(dir.join("hosts.toml")).unwrap();
    let error = load(&[root.path().to_owned()], &[], "x.io").unwrap_err();
    assert!(matches!(error, HostsError::Read { .. }), "{error}");
    std::fs::remove_dir(dir.join("hosts.toml")).unwrap();
    let file = std::fs::File::create(dir.join("hosts.toml")).unwrap();
    file.set_len(MAX_FILE_BYTES + 1).unwrap();
    let error = load(&[root.path().to_owned()], &[], "x.io").unwrap_err();
    assert!(matches!(error, HostsError::Value { .. }), "{error}");
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(text in "\\PC{0,200}") {
        let _ = parse(&text, Path::new("/x/hosts.toml"), &[], "x.io");
    }

    #[test]
    fn mutated_files_are_parsed_or_refused(at in 0usize..160, with in any::<char>()) {
        let text = "server = \"https://x.io\"\n[host.\"https://m.io/p\"]\ncapabilities = [\"pull\"]\n\
                    ca = \"a\"\nclient = [[\"b\", \"c\"]]\ndial_timeout = \"5s\"\n[host.\"https://m.io/p\".header]\na = \"b\"\n";
        let mutated: String = text.chars().enumerate().map(|(i, c)| if i == at { with } else { c }).collect();
        let _ = parse(&mutated, Path::new("/x/hosts.toml"), &[], "x.io");
    }

    #[test]
    fn hosts_round_trip(
        hosts in proptest::collection::btree_set("[a-z]{1,8}\\.example(:[1-9][0-9]{1,3})?", 0..6)
            .prop_map(|hosts| hosts.into_iter().collect::<Vec<_>>())
            .prop_shuffle(),
        caps in proptest::collection::vec(any::<[bool; 3]>(), 6),
    ) {
        let mut text = String::new();
        for (host, [pull, resolve, push]) in hosts.iter().zip(&caps) {
            let names: Vec<_> = [("pull", pull), ("resolve", resolve), ("push", push)]
                .into_iter()
                .filter(|(_, on)| **on)
                .map(|(name, _)| format!("{name:?}"))
                .collect();
            let table = format!("[host.\"https://{host}\"]\ncapabilities = [{}]\n", names.join(", "));
            text += &table;
        }
        let parsed = parsed(&text, "x.io");
        prop_assert_eq!(parsed.len(), hosts.len() + 1);
        for ((parsed, host), [pull, resolve, push]) in parsed.iter().zip(&hosts).zip(caps) {
            prop_assert_eq!(&parsed.authority, host);
            let expected = if pull || resolve || push {
                Capabilities { pull, resolve, push }
            } else {
                ALL
            };
            prop_assert_eq!(parsed.capabilities, expected);
        }
    }
}
