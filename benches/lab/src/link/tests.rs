use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Sends bodies over one link by a clock of its own: each turn goes to the stream that can send
/// first, as the waiting tasks would take turns. Gives when the last byte of each arrived.
fn simulate(
    model: &LinkModel,
    start: Instant,
    bodies: &[u64],
    windows: &mut [Window],
) -> Vec<Duration> {
    let mut bucket = Bucket::new(model.rate_bits_per_s);
    let mut left = bodies.to_vec();
    let mut eligible = vec![start; bodies.len()];
    while let Some(stream) = (0..left.len())
        .filter(|&stream| left[stream] > 0)
        .min_by_key(|&stream| eligible[stream])
    {
        let now = eligible[stream];
        match windows[stream].allow(now, left[stream].min(model.quantum())) {
            Ok(bytes) => {
                let slot = bucket.reserve(now, bytes);
                windows[stream].sent(slot.start + model.rtt, bytes);
                eligible[stream] = slot.finish;
                left[stream] -= bytes;
            }
            Err(ack) => eligible[stream] = ack,
        }
    }
    eligible.iter().map(|at| *at - start).collect()
}

#[test]
fn a_new_connection_pays_for_slow_start() {
    let model = LinkModel::wan();
    let mut window = [model_window(&model)];
    // 14,600 bytes fit the first window: no waiting for acknowledgements.
    let took = simulate(&model, Instant::now(), &[14_600], &mut window)[0];
    assert!(took < ms(2), "{took:?}");
    // 1 + 2 + 4 + 8 windows are 219,000 bytes: three more round trips, then the last window.
    let mut window = [model_window(&model)];
    let took = simulate(&model, Instant::now(), &[219_000], &mut window)[0];
    assert!(took > ms(120) && took < ms(132), "{took:?}");
}

#[test]
fn a_long_body_runs_at_the_rate() {
    for model in [LinkModel::wan(), LinkModel::cloud(), LinkModel::lan()] {
        let bytes = model.rate_bits_per_s / 8 * 10;
        let took = simulate(
            &model,
            Instant::now(),
            &[bytes],
            &mut [model_window(&model)],
        )[0];
        // Ten seconds' worth, and less than eight round trips of slow start.
        assert!(took >= Duration::from_secs(10), "{model}: {took:?}");
        assert!(
            took < Duration::from_secs(10) + model.rtt * 8,
            "{model}: {took:?}"
        );
    }
}

#[test]
fn the_window_stays_on_the_connection_unless_idle_reset_is_on() {
    for (idle_reset, fast) in [(None, true), (Some(ms(1000)), false)] {
        let model = LinkModel {
            idle_reset,
            ..LinkModel::wan()
        };
        let mut window = [model_window(&model)];
        let start = Instant::now();
        let first = simulate(&model, start, &[400_000], &mut window)[0];
        let second = simulate(&model, start + first + ms(5000), &[219_000], &mut window)[0];
        assert_eq!(second < ms(40), fast, "{second:?}");
    }
}

#[test]
fn a_late_sender_grows_its_window_all_the_same() {
    let model = LinkModel::wan();
    let mut window = model_window(&model);
    let mut now = Instant::now();
    for round in 0..5 {
        // All acknowledgements are there before anything else is sent.
        now += model.rtt * 2;
        assert_eq!(window.allow(now, 1), Ok(1));
        assert_eq!(window.size, 14_600 << round);
        let mut left = window.size;
        while left > 0 {
            let bytes = window.allow(now, left.min(4000)).unwrap();
            window.sent(now + model.rtt, bytes);
            left -= bytes;
        }
    }
}

#[test]
fn an_unused_window_does_not_grow() {
    let model = LinkModel::wan();
    let mut window = model_window(&model);
    let mut now = Instant::now();
    for _ in 0..100 {
        assert_eq!(window.allow(now, 1000), Ok(1000));
        window.sent(now + model.rtt, 1000);
        now += ms(50);
    }
    assert_eq!(window.size, window.initial);
}

#[test]
fn streams_share_evenly_and_a_short_reply_is_not_stuck() {
    let model = LinkModel::wan();
    let mut windows = [
        model_window(&model),
        model_window(&model),
        model_window(&model),
    ];
    let took = simulate(
        &model,
        Instant::now(),
        &[10_000_000, 10_000_000, 10_000],
        &mut windows,
    );
    assert!(took[2] < ms(5), "{took:?}");
    let (a, b) = (took[0].as_secs_f64(), took[1].as_secs_f64());
    assert!((a - b).abs() / a < 0.02, "{took:?}");
    // Both together are bound by the rate.
    assert!(a.max(b) >= 1.6 && a.max(b) < 1.6 + 0.3, "{took:?}");
}

#[test]
fn a_late_sender_makes_up_and_an_idle_line_saves_nothing() {
    let start = Instant::now();
    let mut bucket = Bucket::new(8_000_000);
    let first = bucket.reserve(start, 1000);
    assert_eq!(first.finish, start + ms(1));
    // Woken 3 ms late, the stream goes on from where it was.
    assert_eq!(bucket.reserve(first.finish, 1000).finish, start + ms(2));
    // After a pause the line starts afresh.
    let later = start + ms(500);
    assert_eq!(bucket.reserve(later, 1000).start, later);
}

#[test]
fn texts_and_json_name_links() {
    assert_eq!("wan".parse(), Ok(LinkModel::wan()));
    assert_eq!("100mbit,40ms".parse(), Ok(LinkModel::wan()));
    assert_eq!("10gbit, 200us".parse(), Ok(LinkModel::lan()));
    for bad in [
        "",
        "fast",
        "100,40",
        "0mbit,1ms",
        "1mbit,-1ms",
        "nanmbit,1ms",
        "1mbit,1",
    ] {
        assert!(bad.parse::<LinkModel>().is_err(), "{bad}");
    }
    let json = serde_json::to_string(&LinkModel::cloud()).unwrap();
    assert_eq!(
        serde_json::from_str::<LinkModel>(&json).unwrap(),
        LinkModel::cloud()
    );
    let short: LinkModel =
        serde_json::from_str(r#"{"rate_bits_per_s":100000000,"rtt_ms":40}"#).unwrap();
    assert_eq!(short, LinkModel::wan());
}

fn model_window(model: &LinkModel) -> Window {
    Window::new(model)
}
