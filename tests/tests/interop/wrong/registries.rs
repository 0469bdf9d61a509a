//! Registries that refuse, fail or lie.

use std::{fs::File, time::Duration};

use lab::{Action, Auth, Credentials, Lab, LabOptions, Match, Rule, Tls};
use suite::{
    host::Came,
    images::noise,
    process::wait_for,
    pushed::{PushedImage, cri_labels},
    workdir::Workdir,
};

use super::{SIZE, alive, failed_pages, layer, refused};
use crate::{
    fixture::{CONFIG, Fixture, runtime},
    world::ready,
};

#[test]
fn a_registry_that_fails_or_lies_costs_laziness_only() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.resolve_timeout = \"3s\"\n"));
    let pid = fixture.daemon.pid();
    let status = |status| Action::Status {
        status,
        retry_after: None,
    };
    let cases: [(&str, Action, &[&str]); 6] = [
        ("status 401", status(401), &["answered 401"]),
        ("status 403", status(403), &["answered 403"]),
        ("status 404", status(404), &["does not have it (404"]),
        // Tried again until the time is up.
        ("status 503", status(503), &["last failure: "]),
        (
            "shifted ranges",
            Action::ShiftContentRange { by: 1 },
            &["ange"],
        ),
        // Every answer ends early: within the deadline, or by it.
        (
            "cut answers",
            Action::Truncate { after: 10 },
            &["layer", "resolved"],
        ),
    ];
    runtime().block_on(async {
        for (index, (what, action, expected)) in cases.into_iter().enumerate() {
            let image = PushedImage::push(
                &fixture.lab,
                &format!("wrong/registry{index}"),
                "1",
                &[layer(300 + index as u64)],
            );
            let rule = Rule::new(Match::blob(image.layers[0].digest()), action);
            let rule = fixture.lab.rules().add(rule);
            let why = refused(&fixture, &image, what).await;
            assert!(
                expected.iter().any(|part| why.contains(part)),
                "{what}: {why}"
            );
            let state = fixture.lab.rules().state(rule).expect("the rule");
            assert!(state.acted > 0, "{what}: the rule never acted");
            fixture.lab.rules().remove(rule);
            alive(&fixture, pid);
        }
        // A blob that is shorter than its descriptor says.
        let image = PushedImage::push(&fixture.lab, "wrong/short", "1", &[layer(400)]);
        let path = fixture.lab.store().blob_path(&image.layers[0].digest());
        let file = File::options().write(true).open(path).expect("the blob");
        file.set_len(image.layers[0].descriptor.size / 2)
            .expect("cut");
        refused(&fixture, &image, "short blob").await;
        // One byte of the TOC is another.
        let image = PushedImage::push(&fixture.lab, "wrong/toc", "1", &[layer(401)]);
        let size = image.layers[0].descriptor.size;
        let flip = Action::Flip {
            at: size - 200,
            len: 1,
        };
        fixture
            .lab
            .rules()
            .add(Rule::new(Match::blob(image.layers[0].digest()), flip));
        let why = refused(&fixture, &image, "flipped TOC").await;
        assert!(why.contains("layer"), "{why}");
        alive(&fixture, pid);
    });
}

#[test]
fn a_registry_that_lets_nobody_in_is_named() {
    if !ready() {
        return;
    }
    let hosts = Workdir::new();
    let fixture = Fixture::new(&format!(
        "{CONFIG}registry.config_path = {:?}\nlazy.resolve_timeout = \"3s\"\n",
        hosts.path().display().to_string()
    ));
    let pid = fixture.daemon.pid();
    let start = |name: &str, tls: Tls, auth: Auth, seed: u64| {
        let options = LabOptions {
            tls,
            auth,
            ..LabOptions::new(fixture.work.sub(name))
        };
        let lab = Lab::start_blocking(options).expect("a registry");
        let dir = hosts.sub(&format!("{name}.example"));
        std::fs::write(
            dir.join("hosts.toml"),
            format!("server = {:?}\n", lab.url()),
        )
        .expect("hosts.toml");
        let mut image = PushedImage::push(&lab, "a/image", "1", &[layer(seed)]);
        image.reference = format!("{name}.example/a/image:1");
        (lab, image)
    };
    let credentials = Credentials {
        user: "somebody".into(),
        password: "else".into(),
    };
    runtime().block_on(async {
        let (_lab, image) = start("untrusted", Tls::SelfSigned, Auth::None, 500);
        let why = refused(&fixture, &image, "untrusted certificate").await;
        assert!(why.to_lowercase().contains("certificate"), "{why}");
        let (_lab, image) = start("closed", Tls::Off, Auth::Basic(credentials), 501);
        let why = refused(&fixture, &image, "no credentials").await;
        assert!(why.contains("401"), "{why}");
        let (lab, image) = start("gone", Tls::Off, Auth::None, 502);
        drop(lab);
        refused(&fixture, &image, "nobody listens").await;
        alive(&fixture, pid);
    });
}

#[test]
fn a_registry_that_ignores_ranges_still_gives_right_bytes() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let pid = fixture.daemon.pid();
    let image = PushedImage::push(&fixture.lab, "wrong/whole", "1", &[layer(402)]);
    let ignore = Rule::new(Match::blob(image.layers[0].digest()), Action::IgnoreRange);
    let rule = fixture.lab.rules().add(ignore);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let (parent, came) = host.pull(&image, cri_labels).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &[]);
        if came != [Came::Lazily] {
            let why = fixture.why_not(&image, 0);
            assert!(why.contains("range"), "{why}");
        }
        let state = fixture.lab.rules().state(rule).expect("the rule");
        assert!(state.acted > 0, "the rule never acted");
        alive(&fixture, pid);
    });
}

#[test]
fn reads_fail_with_an_event_and_never_give_wrong_bytes() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let pid = fixture.daemon.pid();
    let status = |status| Action::Status {
        status,
        retry_after: None,
    };
    let cases = [
        (
            "flipped",
            Action::Flip {
                at: SIZE as u64 / 2,
                len: 1,
            },
        ),
        ("missing", status(404)),
        ("forbidden", status(403)),
        ("unauthorized", status(401)),
        ("shifted", Action::ShiftContentRange { by: 4096 }),
    ];
    runtime().block_on(async {
        for (index, (what, action)) in cases.into_iter().enumerate() {
            let seed = 600 + index as u64;
            let repository = format!("wrong/reads{index}");
            let image = PushedImage::push(&fixture.lab, &repository, "1", &[layer(seed)]);
            let digest = image.layers[0].digest();
            let host = fixture.host(what).await;
            let parent = fixture.pull_lazily(&host, &image).await;
            let (_, container) = fixture.container(&host, &parent, "c").await;
            let before = fixture.daemon.log().len();
            let rule = Rule::new(Match::blob(digest), action);
            let rule = fixture.lab.rules().add(rule);
            let path = container.path().join("data");
            let expected = noise(seed, SIZE);
            let failed = failed_pages(&path, &expected);
            let pages = SIZE / 4096;
            eprintln!("{what}: {failed} of {pages} pages failed");
            assert!(failed > 0, "{what}: every page was read");
            if what == "flipped" {
                assert!(failed < pages, "{what}: all pages failed");
            }
            let log = fixture.daemon.log();
            let event = log[before..]
                .lines()
                .find(|line| line.contains("WARN") && line.contains(&digest.to_string()));
            let event = event.unwrap_or_else(|| panic!("{what}: no event:\n{}", &log[before..]));
            eprintln!("{what}: {event}");
            let shown = fixture.layer(&digest.to_string());
            let events = shown["cache"]["events"].as_array().expect("events");
            let told = events.iter().filter_map(|event| event["message"].as_str());
            let told: Vec<&str> = told.collect();
            assert!(
                told.iter().any(|event| event.contains(&digest.to_string())
                    && (event.contains("offset") || event.contains("bytes"))),
                "{what}: {told:?}"
            );
            alive(&fixture, pid);
            // When the registry is well again, so are the reads.
            fixture.lab.rules().remove(rule);
            wait_for("all pages", Duration::from_secs(60), || {
                failed_pages(&path, &expected) == 0
            });
            fixture.same_tree(&image, container.path(), &[]);
        }
        alive(&fixture, pid);
    });
}
