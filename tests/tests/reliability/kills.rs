//! kill -9 of the daemon.

use std::{
    collections::BTreeMap,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use suite::{host::Host, pushed::PushedImage};
use tonic::Status;

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    worker::{Job, Sums, Worker},
    world::{container, pull, push, ready, sizes},
};

const KILLS: u64 = 100;
const LONG: Duration = Duration::from_secs(120);

/// xorshift; the seed is printed, and taken from `SNAPSHOTTERD_TEST_SEED` to repeat a run.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let given = std::env::var("SNAPSHOTTERD_TEST_SEED").ok();
        let seed = given.and_then(|text| text.parse().ok()).unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            u64::from(since.expect("a clock after 1970").subsec_nanos())
        });
        eprintln!("SNAPSHOTTERD_TEST_SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What a runtime asks for while the daemon is killed.
#[derive(Clone)]
enum Asked {
    Nothing,
    /// A container on a snapshot that is there.
    Container(String),
    /// Another image and a container on it.
    Image(Box<PushedImage>),
}

impl Asked {
    /// Gives the container's key and mounts.
    async fn ask(
        &self,
        host: &Host,
    ) -> Result<Option<(String, Vec<snapshotterd::api::types::Mount>)>, Status> {
        let parent = match self {
            Self::Nothing => return Ok(None),
            Self::Container(parent) => parent.clone(),
            Self::Image(image) => pull(host, image).await?,
        };
        container(host, &parent).await.map(Some)
    }
}

#[test]
fn a_hundred_kills_fail_no_read_and_no_request_for_good() {
    if !ready(1500) {
        return;
    }
    let mut random = Random::new();
    let mut fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let large = [6 << 20, 3 << 20, 700_000];
    let layers = [
        sizes(60, &large),
        sizes(60, &large),
        sizes(60, &large),
        sizes(200, &[2 << 20]),
    ];
    let (image, sums) = push(&fixture.lab, "a/main", 1, &layers);
    // Each needs the registry for every byte.
    let fresh: Vec<(PushedImage, Sums)> = (0..KILLS / 4)
        .map(|n| {
            let layers = [sizes(5, &[300_000]), sizes(5, &[])];
            push(&fixture.lab, &format!("a/fresh{n}"), 100 + n, &layers)
        })
        .collect();
    let small: Sums = sums.iter().take(12).map(|(p, d)| (p.clone(), *d)).collect();

    let runtime = runtime();
    let (parent, main) = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, main) = fixture.container(&host, &parent, "main").await;
        (parent, main)
    });
    let stop = fixture.work.path().join("stop");
    let scratch = fixture.work.sub("w");
    let job = Job::Passes {
        stop: stop.clone(),
        hold: false,
    };
    let mut reader = Worker::start(&scratch, "main", job, main.path(), &sums);

    let (mut interrupted, mut longest_start) = (0, Duration::ZERO);
    for round in 0..KILLS {
        let index = usize::try_from(round / 4).expect("small");
        let (asked, expected) = match round % 4 {
            1 => (Asked::Container(parent.clone()), &small),
            3 => (
                Asked::Image(Box::new(fresh[index].0.clone())),
                &fresh[index].1,
            ),
            _ => (Asked::Nothing, &small),
        };
        let host = runtime.block_on(fixture.host("default"));
        let asking = runtime.spawn({
            let asked = asked.clone();
            async move { asked.ask(&host).await }
        });
        thread::sleep(Duration::from_millis(random.below(match asked {
            Asked::Nothing => 400,
            _ => 150,
        })));
        fixture.daemon.kill();
        let began = Instant::now();
        fixture.daemon.restart();
        longest_start = longest_start.max(began.elapsed());
        reader.assert_running(&format!("in round {round}"));
        // Answered before the kill, it holds after it; else a runtime asks again.
        let host = runtime.block_on(fixture.host("default"));
        let answer = if let Ok(answer) = runtime.block_on(asking).expect("no panic") {
            answer
        } else {
            interrupted += 1;
            let again = runtime.block_on(asked.ask(&host));
            again.unwrap_or_else(|status| {
                panic!("round {round}: {status}\n{}", fixture.daemon.log())
            })
        };
        if let Some((key, mounts)) = answer {
            let same = runtime.block_on(host.mounts(&key));
            assert_eq!(same.expect("Mounts"), mounts, "round {round}");
            let mounted = host.mount(&format!("r{round}"), &mounts);
            check_once(&scratch, mounted.path(), expected);
            drop(mounted);
            let removed = runtime.block_on(host.remove(&key));
            removed.expect("a removed container");
        }
    }
    std::fs::write(&stop, "").expect("a file");
    let report = reader.finish(LONG);
    let replayed = replayed(&fixture.daemon.log());
    eprintln!(
        "{KILLS} kills: {} passes, {} reads, longest {} ms; {replayed} reads were answered by a \
         successor; {interrupted} requests interrupted; longest start {longest_start:?}",
        report.passes, report.reads, report.longest_ms
    );
    assert!(interrupted > 0, "no kill hit a request");
    assert!(replayed > 0, "no kill hit a read");
    assert_eq!(fixture.recovered(), serde_json::json!([]));
}

fn check_once(scratch: &Path, root: &Path, sums: &Sums) {
    let job = Job::Passes {
        stop: "/".into(),
        hold: false,
    };
    Worker::start(scratch, "once", job, root, sums).finish(LONG);
}

/// Sum of `replayed=` over all starts.
fn replayed(log: &str) -> u64 {
    log.lines()
        .filter_map(|line| line.split_once("replayed=")?.1.split_whitespace().next())
        .map(|number| number.trim_matches('"').parse::<u64>().unwrap_or(0))
        .sum()
}

/// With nobody left to answer, the kernel fails what waits; the next start makes everything new.
#[test]
fn daemon_and_holder_dead_means_errors_not_zeros() {
    if !ready(240) {
        return;
    }
    let mut fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let layers = [sizes(30, &[2 << 20, 400_000])];
    let (image, sums) = push(&fixture.lab, "a/b", 7, &layers);
    let runtime = runtime();
    let (parent, main) = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, main) = fixture.container(&host, &parent, "main").await;
        (parent, main)
    });
    let scratch = fixture.work.sub("w");
    let holder = crate::world::holder_of(&fixture.work.path().join("d/run")).expect("a holder");
    // Large ones, each alone in its chunks: nothing of them has come with another.
    let blocked: Sums = sums
        .iter()
        .filter(|(path, _)| path.ends_with("30"))
        .map(|(path, sum)| (path.clone(), *sum))
        .collect();
    let later: Sums = sums
        .iter()
        .filter(|(path, _)| path.ends_with("31"))
        .map(|(path, sum)| (path.clone(), *sum))
        .collect();
    assert_eq!((blocked.len(), later.len()), (1, 1));
    let rules: BTreeMap<_, _> = image
        .layers
        .iter()
        .map(|layer| (layer.digest(), fixture.lab.stall(layer.digest())))
        .collect();
    let mut waiting = Worker::start(&scratch, "waiting", Job::ThreadsFail, main.path(), &blocked);
    suite::process::wait_for("a blocked reader", LONG, || waiting.blocked() == 1);
    fixture.daemon.kill();
    rustix::process::kill_process(holder, rustix::process::Signal::KILL).expect("our holder");
    waiting.finish(LONG);
    let mut reader = Worker::start(&scratch, "later", Job::ThreadsFail, main.path(), &later);
    reader.finish(LONG);
    eprintln!("{}{}", waiting.log(), reader.log());

    for rule in rules.values() {
        fixture.lab.release(*rule);
    }
    fixture.daemon.restart();
    assert_eq!(fixture.recovered(), serde_json::json!([]));
    runtime.block_on(async {
        let host = fixture.host("default").await;
        let (_, second) = fixture.container(&host, &parent, "second").await;
        check_once(&scratch, second.path(), &sums);
    });
}
