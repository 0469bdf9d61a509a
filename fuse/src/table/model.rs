//! The protocol against every place to die and every order of two threads, by enumeration.
//!
//! The code under test is the real one (`Session`, `Ticket`, `Table` on a real memfd). Simulated
//! are the kernel (requests, the set it waits for, answers) and the scheduler: a run is a list of
//! decisions, at each arrow one thread goes on or the process dies; a depth-first search tries
//! them all. A dead process does not unwind into the protocol: its threads stop at the arrow.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Range,
    os::fd::{BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    sync::Arc,
    thread,
};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::{Table, scratch, steps::with_hook};
use crate::{
    sys::{
        abi::{self, op},
        arena::{Arena, Buffer},
        map::{SharedMap, WORD},
    },
    table::layout::{MAX_READERS, header},
    transport::{Channel, Received, Session, Ticket},
};

/// The kernel's side of a session: what is queued, what it waits for, what was answered.
#[derive(Debug, Default)]
struct Kernel {
    queued: Mutex<VecDeque<Sent>>,
    waiting: Mutex<Vec<u64>>,
    answers: Mutex<BTreeMap<u64, Vec<u8>>>,
    refused: Mutex<Vec<u64>>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    unique: u64,
    opcode: u32,
    fh: u64,
}

/// The RELEASE of the handle that an OPEN got has that unique, plus this.
const RELEASE: u64 = 100;

impl Kernel {
    /// A READ; an OPEN if the unique ends in 5; a RELEASE once that is answered.
    fn send(&self, unique: u64) {
        let opcode = if unique % 10 == 5 { op::OPEN } else { op::READ };
        self.queue(unique, opcode, 0);
    }

    fn queue(&self, unique: u64, opcode: u32, fh: u64) {
        self.queued.lock().push_back(Sent { unique, opcode, fh });
    }
}

/// The device, as one process has it open.
#[derive(Debug)]
struct Device(Arc<Kernel>);

impl Channel for Device {
    fn receive(&self, map: &SharedMap, range: Range<usize>) -> io::Result<usize> {
        let sent = self.0.queued.lock().pop_front().ok_or(Errno::AGAIN)?;
        let words = &map.words()[range.start / WORD..];
        let values = [
            abi::word(80, sent.opcode),
            sent.unique,
            257,
            0,
            abi::word(1, 0),
            sent.fh,
            sent.unique * 1000,
            abi::word(4096, 0),
        ];
        for (word, value) in words.iter().zip(values) {
            word.store(value, std::sync::atomic::Ordering::Relaxed);
        }
        if sent.opcode != op::FORGET {
            self.0.waiting.lock().push(sent.unique);
        }
        Ok(80)
    }

    fn reply(&self, buffer: &mut Buffer, unique: u64, error: i32, len: usize) -> io::Result<()> {
        let mut waiting = self.0.waiting.lock();
        let Some(at) = waiting.iter().position(|u| *u == unique) else {
            self.0.refused.lock().push(unique);
            return Err(Errno::NOENT.into());
        };
        waiting.swap_remove(at);
        let message = buffer.message(unique, error, len)?.to_vec();
        if unique % 10 == 5 && unique < RELEASE {
            let fh = u64::from_le_bytes(*message[16..].first_chunk().unwrap());
            assert_ne!(fh, 0, "an OPEN without a handle");
            self.0.queue(unique + RELEASE, op::RELEASE, fh);
        }
        let earlier = self.0.answers.lock().insert(unique, message);
        assert!(earlier.is_none(), "the kernel was answered twice");
        Ok(())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn session(
    kernel: &Arc<Kernel>,
    fd: &OwnedFd,
    generation: u64,
    arena: &Arc<Arena>,
) -> Arc<Session> {
    let table = Table::open(fd.try_clone().unwrap(), generation).unwrap();
    Arc::new(Session::new(
        "model".to_owned(),
        table,
        Box::new(Device(Arc::clone(kernel))),
        Arc::clone(arena),
    ))
}

/// Answers as BlobFs would: a READ with its offset, an OPEN with a handle.
fn serve(session: &Session, ticket: Ticket) {
    let request = *ticket.request();
    match request.opcode {
        op::OPEN => {
            let fh = ticket.grant_handle(1).unwrap().fh;
            ticket.answer_bytes(&abi::open_out(fh, 0));
        }
        op::RELEASE => {
            session.table().close_handle(request.fh);
            ticket.answer_bytes(&[]);
        }
        _ => ticket.answer_bytes(&request.offset.to_le_bytes()),
    }
}

/// What a reader thread does until there is nothing to read. Requests with an odd unique are
/// answered at once, the others by whoever runs `late`.
fn read_all(session: &Arc<Session>, slot: usize, late: &Mutex<Vec<Ticket>>) {
    loop {
        match session.receive(slot).unwrap() {
            Received::Nothing => return,
            Received::Request(ticket) if ticket.request().unique % 2 == 1 => {
                serve(session, ticket);
            }
            Received::Request(ticket) => late.lock().push(ticket),
            Received::Ignored | Received::Interrupt { .. } => {}
            Received::Ended => panic!("the model's session does not end"),
        }
    }
}

fn answer_late(session: &Session, late: &Mutex<Vec<Ticket>>) {
    // Bound first: the lock must not be held at an arrow.
    let next = || late.lock().pop();
    while let Some(ticket) = next() {
        serve(session, ticket);
    }
}

/// Thrown through a simulated thread when its process dies.
struct Killed;

/// One decision of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Run(usize),
    Kill,
}

/// Runs the threads of one process one at a time, as a list of decisions says.
struct Scheduler {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Threads that have not ended.
    alive: Vec<usize>,
    /// How many have arrived at their next arrow or ended.
    arrived: usize,
    turn: Option<usize>,
    dead: bool,
}

impl Scheduler {
    fn new(threads: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                alive: (0..threads).collect(),
                arrived: 0,
                turn: None,
                dead: false,
            }),
            changed: Condvar::new(),
        })
    }

    /// At an arrow: waits for the next turn, or dies.
    fn pause(&self, me: usize) {
        let mut state = self.state.lock();
        state.turn = None;
        state.arrived += 1;
        self.changed.notify_all();
        while state.turn != Some(me) && !state.dead {
            self.changed.wait(&mut state);
        }
        if state.dead {
            drop(state);
            resume_unwind(Box::new(Killed));
        }
    }

    fn end(&self, me: usize) {
        let mut state = self.state.lock();
        state.alive.retain(|thread| *thread != me);
        if state.turn == Some(me) {
            state.turn = None;
        }
        self.changed.notify_all();
    }

    /// Waits until every living thread stands at an arrow; the living ones.
    fn settle(&self, started: &mut bool) -> Vec<usize> {
        let mut state = self.state.lock();
        loop {
            let standing = if *started {
                state.turn.is_none()
            } else {
                state.arrived == state.alive.len()
            };
            if standing {
                *started = true;
                return state.alive.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    fn apply(&self, choice: Choice) {
        let mut state = self.state.lock();
        match choice {
            Choice::Run(thread) => state.turn = Some(thread),
            Choice::Kill => state.dead = true,
        }
        self.changed.notify_all();
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// Runs one process under `script`, then without preemption to its end. Returns the decisions that
/// were taken and how many alternatives each had.
fn run_process(
    work: Vec<Work>,
    script: &[Choice],
    preemptions: usize,
) -> Vec<(Choice, Vec<Choice>)> {
    let scheduler = Scheduler::new(work.len());
    let mut trace = Vec::new();
    thread::scope(|scope| {
        for (me, work) in work.into_iter().enumerate() {
            let scheduler = Arc::clone(&scheduler);
            scope.spawn(move || {
                let hook = {
                    let scheduler = Arc::clone(&scheduler);
                    Rc::new(move |_: &'static str| scheduler.pause(me))
                };
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    scheduler.pause(me);
                    with_hook(hook, work);
                }));
                scheduler.end(me);
                if let Err(payload) = outcome
                    && !payload.is::<Killed>()
                {
                    resume_unwind(payload);
                }
            });
        }
        let (mut started, mut last, mut switches) = (false, None, 0);
        loop {
            let alive = scheduler.settle(&mut started);
            if alive.is_empty() {
                break;
            }
            let stay = last.filter(|thread| alive.contains(thread));
            let mut options = Vec::new();
            match stay {
                Some(thread) => {
                    options.push(Choice::Run(thread));
                    if switches < preemptions {
                        let others = alive.iter().filter(|t| **t != thread);
                        options.extend(others.map(|t| Choice::Run(*t)));
                    }
                }
                None => options.extend(alive.iter().map(|t| Choice::Run(*t))),
            }
            options.push(Choice::Kill);
            let choice = script.get(trace.len()).copied().unwrap_or(options[0]);
            if let (Choice::Run(thread), Some(stay)) = (choice, stay)
                && thread != stay
            {
                switches += 1;
            }
            if let Choice::Run(thread) = choice {
                last = Some(thread);
            }
            trace.push((choice, options));
            scheduler.apply(choice);
            if choice == Choice::Kill {
                break;
            }
        }
    });
    trace
}

/// All runs of `run`, which returns what it decided and what it could have decided.
fn explore(mut run: impl FnMut(&[Choice]) -> Vec<(Choice, Vec<Choice>)>) -> usize {
    let mut script = Vec::new();
    let mut runs = 0;
    loop {
        let trace = run(&script);
        runs += 1;
        // The next run differs in the last decision that has an alternative left.
        let next = (0..trace.len()).rev().find_map(|at| {
            let (choice, options) = &trace[at];
            let taken = options.iter().position(|o| o == choice)?;
            Some((at, *options.get(taken + 1)?))
        });
        let Some((at, choice)) = next else {
            return runs;
        };
        script = trace[..at].iter().map(|(choice, _)| *choice).collect();
        script.push(choice);
    }
}

/// After all deaths a last process answers everything: each request exactly once and rightly, and
/// the table is empty.
fn check(kernel: &Arc<Kernel>, fd: &OwnedFd, generation: u64, arena: &Arc<Arena>, sent: &[u64]) {
    let last = session(kernel, fd, generation, arena);
    for ticket in taken_over(&last) {
        serve(&last, ticket);
    }
    let late = Mutex::default();
    read_all(&last, 0, &late);
    answer_late(&last, &late);
    assert!(kernel.waiting.lock().is_empty(), "a reader waits for ever");
    let answers = kernel.answers.lock();
    for unique in sent {
        let message = answers.get(unique).expect("a request without an answer");
        assert_eq!(message[4..8], [0; 4], "request {unique} got an error");
        if unique % 10 == 5 {
            assert!(answers.contains_key(&(unique + RELEASE)), "not released");
        } else {
            let right = (unique * 1000).to_le_bytes();
            assert_eq!(message[16..], right, "request {unique}");
        }
    }
    drop(answers);
    assert!(last.take_over().unwrap().is_empty(), "a record was left");
    let open = last.table().open_nodes();
    assert!(open.is_empty(), "a handle was left");
    for reader in 0..MAX_READERS {
        assert!(last.table().landed(reader).is_none());
    }
}

/// What a successor takes over: no request twice (an OPEN would get two handles).
fn taken_over(session: &Arc<Session>) -> Vec<Ticket> {
    let taken = session.take_over().unwrap();
    let mut uniques: Vec<_> = taken.iter().map(|t| t.request().unique).collect();
    uniques.sort_unstable();
    uniques.dedup();
    assert_eq!(uniques.len(), taken.len(), "a request was taken over twice");
    taken
}

fn raise(fd: &OwnedFd, generation: u64) {
    let head = SharedMap::new(fd, 0, 4096).unwrap();
    header::generation(&head).store(generation, std::sync::atomic::Ordering::SeqCst);
}

/// A first daemon with two readers that also answer late, killed at every arrow; then the check.
fn first_daemon(
    script: &[Choice],
    preemptions: usize,
    uniques: &[u64],
    arena: &Arc<Arena>,
) -> Vec<(Choice, Vec<Choice>)> {
    let (kernel, fd) = (Arc::new(Kernel::default()), scratch_small());
    raise(&fd, 1);
    for unique in uniques {
        kernel.send(*unique);
    }
    kernel.queue(3, op::FORGET, 0);
    let late = Arc::new(Mutex::new(Vec::new()));
    let first = session(&kernel, &fd, 1, arena);
    let work = (0..2).map(|slot| {
        let (first, late) = (Arc::clone(&first), Arc::clone(&late));
        Box::new(move || {
            read_all(&first, slot, &late);
            answer_late(&first, &late);
        }) as Work
    });
    let trace = run_process(work.collect(), script, preemptions);
    // A dead process answers nothing: its tickets are memory that is gone.
    std::mem::take(&mut *late.lock())
        .into_iter()
        .for_each(std::mem::forget);
    raise(&fd, 2);
    check(&kernel, &fd, 2, arena, uniques);
    recycle(fd);
    trace
}

/// As above with one reader, then a successor that dies while it takes over.
fn two_daemons(script: &[Choice], arena: &Arc<Arena>) -> Vec<(Choice, Vec<Choice>)> {
    let (kernel, fd) = (Arc::new(Kernel::default()), scratch_small());
    raise(&fd, 1);
    kernel.send(12);
    kernel.send(25);
    let late = Arc::new(Mutex::new(Vec::new()));
    let first = session(&kernel, &fd, 1, arena);
    let work: Work = {
        let late = Arc::clone(&late);
        Box::new(move || {
            read_all(&first, 0, &late);
            answer_late(&first, &late);
        })
    };
    let mut trace = run_process(vec![work], script, 0);
    std::mem::take(&mut *late.lock())
        .into_iter()
        .for_each(std::mem::forget);
    let rest = script.get(trace.len()..).unwrap_or_default().to_vec();
    raise(&fd, 2);
    kernel.send(15);
    let second = session(&kernel, &fd, 2, arena);
    let work: Work = Box::new(move || {
        for ticket in taken_over(&second) {
            serve(&second, ticket);
        }
        let late = Mutex::default();
        read_all(&second, 0, &late);
        answer_late(&second, &late);
    });
    trace.extend(run_process(vec![work], &rest, 0));
    raise(&fd, 3);
    check(&kernel, &fd, 3, arena, &[12, 25, 15]);
    recycle(fd);
    trace
}

thread_local! {
    /// The check leaves a table empty, so it can be used again.
    static SPARE: std::cell::RefCell<Option<OwnedFd>> = const { std::cell::RefCell::new(None) };
}

fn scratch_small() -> OwnedFd {
    SPARE.take().unwrap_or_else(scratch)
}

fn recycle(fd: OwnedFd) {
    SPARE.set(Some(fd));
}

#[test]
fn one_daemon_dies_at_every_arrow_in_every_order() {
    let arena = Arc::new(Arena::new(4096, 4).unwrap());
    let two = explore(|script| first_daemon(script, 2, &[15], &arena));
    let three = explore(|script| first_daemon(script, 1, &[11, 12, 14, 15], &arena));
    eprintln!("{two} runs of an OPEN, {three} of four requests");
    assert!(two.min(three) > 300, "the arrows are not where they were");
}

#[test]
fn a_successor_dies_at_every_arrow_of_its_replay() {
    let arena = Arc::new(Arena::new(4096, 4).unwrap());
    let runs = explore(|script| two_daemons(script, &arena));
    eprintln!("{runs} runs of two daemons");
    assert!(
        runs > 100,
        "{runs} runs: the arrows are not where they were"
    );
}

#[test]
fn a_late_answer_of_an_old_daemon_does_no_harm() {
    let arena = Arc::new(Arena::new(4096, 4).unwrap());
    let (kernel, fd) = (Arc::new(Kernel::default()), scratch());
    raise(&fd, 1);
    kernel.send(12);
    let first = session(&kernel, &fd, 1, &arena);
    let late = Mutex::new(Vec::new());
    read_all(&first, 0, &late);
    raise(&fd, 2);
    let second = session(&kernel, &fd, 2, &arena);
    let taken = second.take_over().unwrap();
    // The old one is not quite dead: a thread of its runtime answers now.
    answer_late(&first, &late);
    // A new request takes no record that is still in use.
    kernel.send(15);
    read_all(&second, 0, &late);
    for ticket in taken {
        serve(&second, ticket);
    }
    answer_late(&second, &late);
    assert_eq!(*kernel.refused.lock(), [12], "the second answer is told so");
    raise(&fd, 3);
    check(&kernel, &fd, 3, &arena, &[12, 15]);
}
