//! A timer with the kernel's precision.
//!
//! The runtime's own rounds up to whole milliseconds, half of the round trip that the `cloud`
//! preset models.

use std::{
    cmp::Reverse, collections::BinaryHeap, future::poll_fn, num::NonZeroU64, sync::Arc, task::Poll,
    time::Instant,
};

use futures_util::task::AtomicWaker;
use parking_lot::{Condvar, Mutex};

/// One thread that wakes tasks at given instants. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Timer {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By time, then by order of asking.
    due: BinaryHeap<Reverse<(Instant, u64)>>,
    wakers: std::collections::HashMap<u64, Arc<AtomicWaker>>,
    next: u64,
    ended: bool,
}

impl Timer {
    pub(super) fn start() -> Self {
        let inner = Arc::new(Inner::default());
        let thread = inner.clone();
        std::thread::spawn(move || {
            // The default of 50 microseconds is a quarter of the round trip of the lan preset.
            let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1000));
            thread.run();
        });
        Self { inner }
    }

    pub(super) async fn sleep_until(&self, at: Instant) {
        let mut entry: Option<Entry<'_>> = None;
        poll_fn(|context| {
            if Instant::now() >= at {
                return Poll::Ready(());
            }
            let entry = entry.get_or_insert_with(|| self.inner.add(at));
            entry.waker.register(context.waker());
            // It may have passed between the first look and the registration.
            if Instant::now() >= at {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.inner.state.lock().ended = true;
        self.inner.changed.notify_one();
    }
}

impl Inner {
    fn add(&self, at: Instant) -> Entry<'_> {
        let waker = Arc::new(AtomicWaker::new());
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        state.wakers.insert(id, waker.clone());
        let earlier = state
            .due
            .peek()
            .is_none_or(|Reverse((first, _))| at < *first);
        state.due.push(Reverse((at, id)));
        drop(state);
        if earlier {
            self.changed.notify_one();
        }
        Entry {
            inner: self,
            id,
            waker,
        }
    }

    fn run(&self) {
        let mut state = self.state.lock();
        while !state.ended {
            match state.due.peek().copied() {
                None => self.changed.wait(&mut state),
                Some(Reverse((at, id))) if at <= Instant::now() => {
                    state.due.pop();
                    if let Some(waker) = state.wakers.remove(&id) {
                        waker.wake();
                    }
                }
                Some(Reverse((at, _))) => {
                    self.changed.wait_until(&mut state, at);
                }
            }
        }
    }
}

/// A sleeping task.
#[derive(Debug)]
struct Entry<'a> {
    inner: &'a Inner,
    id: u64,
    waker: Arc<AtomicWaker>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        // What is left of it in the heap wakes nobody.
        self.inner.state.lock().wakers.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn wakes_in_order_and_never_early() {
        let timer = Timer::start();
        let start = Instant::now();
        let order = Mutex::new(Vec::new());
        let sleep = async |ms: u64| {
            let at = start + Duration::from_millis(ms);
            timer.sleep_until(at).await;
            assert!(Instant::now() >= at);
            order.lock().push(ms);
        };
        tokio::join!(sleep(60), sleep(1), sleep(30), sleep(0));
        assert_eq!(*order.lock(), [0, 1, 30, 60]);
    }
}
