//! The link model: what a client on the far side of a slow or distant line would see.
//!
//! Per connection, the TCP handshake costs one round trip and TLS 1.3 one more; each request costs
//! one round trip, half on the way up, half on the way down; the congestion window starts at
//! [`LinkModel::initial_window`] segments and grows by what is acknowledged (doubling per round
//! trip) and stays on the connection. All connections share one bucket that gives out the rate in
//! small quanta, in the order they are asked for, so streams share it evenly and a short reply
//! waits behind a quantum of each other stream, not behind their whole bodies.
//!
//! The decisions ([`Window`], [`Bucket`]) are functions of given instants; only [`Link`] and
//! [`Pacer`] look at the clock and wait.

use std::{
    collections::VecDeque,
    fmt,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::timer::Timer;

mod timer;

/// How far the sending side may lag behind its schedule and still make up for it. It covers late
/// wake-ups on a busy machine: a stream with data to send owns its share of the line meanwhile.
const LATE: Duration = Duration::from_millis(20);
/// What a receiver's buffer limits the window to.
const MAX_WINDOW: u64 = 6 << 20;

/// A line between the registry and its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::exhaustive_structs,
    reason = "written as a literal by benchmarks"
)]
pub struct LinkModel {
    /// Payload rate of all connections together, bits per second.
    pub rate_bits_per_s: u64,
    /// Round-trip time.
    #[serde(rename = "rtt_ms", with = "milliseconds")]
    pub rtt: Duration,
    /// Payload of one segment in bytes.
    #[serde(default = "default_mss")]
    pub mss: u32,
    /// Congestion window of a new connection in segments.
    #[serde(default = "default_window")]
    pub initial_window: u32,
    /// A connection idle for this long starts over with the initial window; `None`: never.
    #[serde(rename = "idle_reset_ms", default, with = "optional_milliseconds")]
    pub idle_reset: Option<Duration>,
    /// Uploads take their time too (rate only, a bucket of their own).
    #[serde(default)]
    pub shape_uploads: bool,
}

/// A text that names no link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no link: use wan, cloud, lan or RATE,RTT such as 100mbit,40ms")]
#[non_exhaustive]
pub struct LinkParseError(String);

impl LinkModel {
    /// A line of this rate and round-trip time, everything else as usual today.
    pub const fn new(rate_bits_per_s: u64, rtt: Duration) -> Self {
        Self {
            rate_bits_per_s,
            rtt,
            mss: default_mss(),
            initial_window: default_window(),
            idle_reset: None,
            shape_uploads: false,
        }
    }

    /// 100 Mbit/s, 40 ms.
    pub const fn wan() -> Self {
        Self::new(100_000_000, Duration::from_millis(40))
    }

    /// 1 Gbit/s, 2 ms.
    pub const fn cloud() -> Self {
        Self::new(1_000_000_000, Duration::from_millis(2))
    }

    /// 10 Gbit/s, 0.2 ms.
    pub const fn lan() -> Self {
        Self::new(10_000_000_000, Duration::from_micros(200))
    }

    /// The unit in which streams take turns: what the line carries in an eighth of a round trip,
    /// but at most in 1 ms, so that turns are short, and at least in 0.1 ms, so that they are few.
    fn quantum(&self) -> u64 {
        let turn = (self.rtt / 8).clamp(Duration::from_micros(100), Duration::from_millis(1));
        let bits = u128::from(self.rate_bits_per_s) * turn.as_micros() / 1_000_000;
        u64::try_from(bits / 8)
            .unwrap_or(u64::MAX)
            .clamp(u64::from(self.mss.max(1)), 128 << 10)
    }
}

impl FromStr for LinkModel {
    type Err = LinkParseError;

    fn from_str(text: &str) -> Result<Self, LinkParseError> {
        match text {
            "wan" => return Ok(Self::wan()),
            "cloud" => return Ok(Self::cloud()),
            "lan" => return Ok(Self::lan()),
            _ => {}
        }
        let parsed = text.split_once(',').and_then(|(rate, rtt)| {
            let rate = with_unit(rate, &[("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)])?;
            let rtt = with_unit(rtt, &[("ms", 1e-3), ("us", 1e-6), ("s", 1.0)])?;
            let rtt = Duration::try_from_secs_f64(rtt).ok()?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "within the checked bounds"
            )]
            let rate = (1.0..1e15).contains(&rate).then_some(rate as u64)?;
            Some(Self::new(rate, rtt))
        });
        parsed.ok_or_else(|| LinkParseError(text.chars().take(64).collect()))
    }
}

impl fmt::Display for LinkModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kbit = self.rate_bits_per_s / 1000;
        write!(
            f,
            "{}.{:03} Mbit/s, {:?}",
            kbit / 1000,
            kbit % 1000,
            self.rtt
        )
    }
}

/// A line in use.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) model: LinkModel,
    down: Mutex<Bucket>,
    up: Mutex<Bucket>,
    timer: Timer,
}

impl Link {
    pub(crate) fn new(model: LinkModel) -> Self {
        Self {
            model,
            down: Mutex::new(Bucket::new(model.rate_bits_per_s)),
            up: Mutex::new(Bucket::new(model.rate_bits_per_s)),
            timer: Timer::start(),
        }
    }

    pub(crate) fn window(&self) -> Window {
        Window::new(&self.model)
    }

    /// Waits on a clock finer than the runtime's.
    pub(crate) async fn sleep_until(&self, at: Instant) {
        self.timer.sleep_until(at).await;
    }

    /// Waits for an upload of `bytes` to have crossed the line.
    pub(crate) async fn receive(&self, bytes: u64) {
        if self.model.shape_uploads {
            let finish = self.up.lock().reserve(Instant::now(), bytes).finish;
            self.sleep_until(finish).await;
        }
    }
}

/// Paces one response body.
#[derive(Debug)]
pub(crate) struct Pacer {
    pub(crate) link: Arc<Link>,
    pub(crate) window: Arc<Mutex<Window>>,
    /// When the stream could go on sending: its start, the end of its last quantum, or the
    /// acknowledgement it waited for. Kept exact, while the clock is always a little late.
    pub(crate) eligible: Instant,
}

impl Pacer {
    /// Waits until some of `want` bytes have crossed the line; gives how many.
    pub(crate) async fn grant(&mut self, want: u64) -> u64 {
        let want = want.min(self.link.model.quantum());
        loop {
            let now = Instant::now();
            let allowed = self.window.lock().allow(now, want);
            match allowed {
                Ok(bytes) => {
                    let from = self.eligible.max(now.checked_sub(LATE).unwrap_or(now));
                    let slot = self.link.down.lock().reserve(from, bytes);
                    self.window
                        .lock()
                        .sent(slot.start + self.link.model.rtt, bytes);
                    self.eligible = slot.finish;
                    self.link.sleep_until(slot.finish).await;
                    return bytes;
                }
                Err(ack) => {
                    self.eligible = self.eligible.max(ack);
                    self.link.sleep_until(ack).await;
                }
            }
        }
    }
}

/// When some bytes occupy the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    start: Instant,
    finish: Instant,
}

/// The rate, given out first come, first served.
#[derive(Debug)]
struct Bucket {
    rate_bits_per_s: u64,
    /// When the line is free; `None` before first use.
    free: Option<Instant>,
}

impl Bucket {
    fn new(rate_bits_per_s: u64) -> Self {
        Self {
            rate_bits_per_s: rate_bits_per_s.max(1),
            free: None,
        }
    }

    fn reserve(&mut self, from: Instant, bytes: u64) -> Slot {
        let start = self.free.map_or(from, |free| free.max(from));
        let nanos = u128::from(bytes) * 8_000_000_000 / u128::from(self.rate_bits_per_s);
        let finish = start + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX >> 16));
        self.free = Some(finish);
        Slot { start, finish }
    }
}

/// The congestion window of a connection in slow start.
#[derive(Debug)]
pub(crate) struct Window {
    initial: u64,
    mss: u64,
    size: u64,
    in_flight: u64,
    /// When what was sent is acknowledged, how much, and whether it was part of a flight that used
    /// more than half of the window.
    flight: VecDeque<(Instant, u64, bool)>,
    idle_reset: Option<Duration>,
    last_ack: Option<Instant>,
}

impl Window {
    fn new(model: &LinkModel) -> Self {
        let mss = u64::from(model.mss.max(1));
        let initial = mss * u64::from(model.initial_window.max(1));
        Self {
            initial,
            mss,
            size: initial,
            in_flight: 0,
            flight: VecDeque::new(),
            idle_reset: model.idle_reset,
            last_ack: None,
        }
    }

    /// How much of `want` may be sent now, or when to ask again.
    fn allow(&mut self, now: Instant, want: u64) -> Result<u64, Instant> {
        self.settle(now);
        let room = self.size.saturating_sub(self.in_flight);
        match self.flight.front() {
            // Less than a segment is not worth a packet while more room is on its way.
            Some(&(ack, ..)) if room < want.min(self.mss) => {
                self.mark_used();
                Err(ack)
            }
            _ => Ok(want.min(room.max(1))),
        }
    }

    fn sent(&mut self, ack: Instant, bytes: u64) {
        self.in_flight += bytes;
        self.flight.push_back((ack, bytes, false));
        if self.in_flight * 2 > self.size {
            self.mark_used();
        }
    }

    /// What is in flight earns growth when it is acknowledged.
    fn mark_used(&mut self) {
        for (.., used) in self.flight.iter_mut().rev().take_while(|(.., used)| !*used) {
            *used = true;
        }
    }

    fn settle(&mut self, now: Instant) {
        while let Some(&(ack, bytes, used)) = self.flight.front()
            && ack <= now
        {
            self.flight.pop_front();
            self.in_flight -= bytes;
            self.last_ack = Some(ack);
            // A sender that does not use its window does not get a larger one.
            if used {
                self.size = (self.size + bytes).min(MAX_WINDOW.max(self.initial));
            }
        }
        if let (true, Some(limit), Some(last)) =
            (self.flight.is_empty(), self.idle_reset, self.last_ack)
            && now.saturating_duration_since(last) >= limit
        {
            self.size = self.initial;
        }
    }
}

const fn default_mss() -> u32 {
    1460
}

const fn default_window() -> u32 {
    10
}

fn with_unit(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    units.iter().find_map(|(unit, factor)| {
        let number: f64 = text.trim().strip_suffix(unit)?.trim().parse().ok()?;
        Some(number * factor)
    })
}

mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(value.as_secs_f64() * 1e3)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(d)? / 1e3).map_err(D::Error::custom)
    }
}

mod optional_milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::ref_option, reason = "serde asks for this shape")]
    pub(super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => s.serialize_some(&(value.as_secs_f64() * 1e3)),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<f64>::deserialize(d)?
            .map(|ms| Duration::try_from_secs_f64(ms / 1e3).map_err(D::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests;
