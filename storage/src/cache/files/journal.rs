//! What was done to the files of a folder, in order, and what a crash may leave of it.
//!
//! The model is a file system that keeps only what POSIX makes it keep: what was written before a
//! sync of the file began is durable when the sync has ended; everything else is, sector by sector,
//! there or not. Changes of names become durable in order, at the latest with a sync of the folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

const SECTOR: usize = 512;

static JOURNALS: Mutex<BTreeMap<PathBuf, Arc<Journal>>> = Mutex::new(BTreeMap::new());

#[derive(Debug, Default)]
pub(crate) struct Journal(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    ops: Vec<Op>,
    names: BTreeMap<String, usize>,
    inodes: usize,
    /// Files whose next sync fails.
    failing: BTreeSet<String>,
}

#[derive(Debug)]
enum Op {
    Write {
        inode: usize,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// The write at that index has ended.
    Wrote(usize),
    Len {
        inode: usize,
        len: u64,
    },
    /// All that had ended before that index is durable.
    Synced {
        inode: usize,
        before: usize,
    },
    /// What was written and not durable before that index never will be.
    Lost {
        inode: usize,
        before: usize,
    },
    Link {
        name: String,
        inode: usize,
    },
    Unlink(String),
    Rename(String, String),
    FolderSynced {
        before: usize,
    },
}

/// One open file of a folder with a journal.
#[derive(Debug)]
pub(crate) struct Listener {
    journal: Arc<Journal>,
    name: String,
    inode: usize,
}

/// A write that has begun.
pub(crate) struct Begun<'a> {
    journal: &'a Journal,
    index: usize,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.journal.0.lock().ops.push(Op::Wrote(self.index));
    }
}

/// Notes from now on what is done in an empty folder.
pub(crate) fn begin(folder: &Path) -> Arc<Journal> {
    let journal = Arc::<Journal>::default();
    JOURNALS
        .lock()
        .insert(folder.to_owned(), Arc::clone(&journal));
    journal
}

fn of(path: &Path) -> Option<(Arc<Journal>, String)> {
    let journal = JOURNALS.lock().get(path.parent()?).map(Arc::clone)?;
    Some((journal, path.file_name()?.to_str()?.to_owned()))
}

pub(super) fn opened(path: &Path, emptied: bool) -> Option<Listener> {
    let (journal, name) = of(path)?;
    let inode = {
        let mut state = journal.0.lock();
        if let Some(inode) = state.names.get(&name).copied() {
            if emptied {
                state.ops.push(Op::Len { inode, len: 0 });
            }
            inode
        } else {
            let inode = state.inodes;
            state.inodes += 1;
            state.names.insert(name.clone(), inode);
            let link = Op::Link {
                name: name.clone(),
                inode,
            };
            state.ops.push(link);
            inode
        }
    };
    Some(Listener {
        journal,
        name,
        inode,
    })
}

pub(super) fn unlinked(path: &Path) {
    if let Some((journal, name)) = of(path) {
        let mut state = journal.0.lock();
        if state.names.remove(&name).is_some() {
            state.ops.push(Op::Unlink(name));
        }
    }
}

pub(super) fn renamed(from: &Path, to: &Path) {
    if let (Some((journal, from)), Some((_, to))) = (of(from), of(to)) {
        let mut state = journal.0.lock();
        if let Some(inode) = state.names.remove(&from) {
            state.names.insert(to.clone(), inode);
            state.ops.push(Op::Rename(from, to));
        }
    }
}

pub(super) fn mark(path: &Path) -> usize {
    of(path).map_or(0, |(journal, _)| journal.len())
}

pub(super) fn folder_synced(path: &Path, before: usize) {
    if let Some((journal, _)) = of(path) {
        journal.0.lock().ops.push(Op::FolderSynced { before });
    }
}

impl Listener {
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Begun<'_> {
        let mut state = self.journal.0.lock();
        let index = state.ops.len();
        state.ops.push(Op::Write {
            inode: self.inode,
            offset,
            bytes: bytes.to_vec(),
        });
        Begun {
            journal: &self.journal,
            index,
        }
    }

    pub(super) fn len(&self, len: u64) {
        let inode = self.inode;
        self.journal.0.lock().ops.push(Op::Len { inode, len });
    }

    pub(super) fn sync(&self, file: &File) -> io::Result<()> {
        let inode = self.inode;
        let (before, fails) = {
            let mut state = self.journal.0.lock();
            (state.ops.len(), state.failing.remove(&self.name))
        };
        if !fails {
            file.sync_data()?;
            let synced = Op::Synced { inode, before };
            self.journal.0.lock().ops.push(synced);
            return Ok(());
        }
        // As if the pages had been dropped after the disk refused them.
        let mut state = self.journal.0.lock();
        let durable = state.durable(inode, usize::MAX);
        let lost = state.lost(inode, usize::MAX);
        for again in [false, true] {
            for (index, op) in state.ops[..before].iter().enumerate() {
                if let Op::Write {
                    inode: of,
                    offset,
                    bytes,
                } = op
                    && *of == inode
                    && durable.contains(&index) == again
                    && (again || index >= lost)
                {
                    // What is read back from the disk: what is durable, and holes.
                    let hole = vec![0; bytes.len()];
                    file.write_all_at(if again { bytes } else { &hole }, *offset)?;
                }
            }
        }
        state.ops.push(Op::Lost { inode, before });
        Err(io::Error::from_raw_os_error(5))
    }
}

impl State {
    /// The changes to a file that are durable at `cut`, by index.
    fn durable(&self, inode: usize, cut: usize) -> BTreeSet<usize> {
        let ops = &self.ops[..cut.min(self.ops.len())];
        let mut pending = BTreeSet::new();
        let mut ended = BTreeMap::new();
        let mut durable = BTreeSet::new();
        for (index, op) in ops.iter().enumerate() {
            match op {
                Op::Write { inode: of, .. } if *of == inode => {
                    pending.insert(index);
                }
                Op::Len { inode: of, .. } if *of == inode => {
                    pending.insert(index);
                    ended.insert(index, index);
                }
                Op::Wrote(write) if pending.contains(write) => {
                    ended.insert(*write, index);
                }
                Op::Synced { inode: of, before } if *of == inode => {
                    for (change, end) in &ended {
                        if end < before && pending.remove(change) {
                            durable.insert(*change);
                        }
                    }
                }
                Op::Lost { inode: of, before } if *of == inode => {
                    // Pages are lost; the length is not in one.
                    pending.retain(|change| {
                        change >= before || matches!(ops[*change], Op::Len { .. })
                    });
                }
                _ => {}
            }
        }
        durable
    }

    /// What was not durable before that index was lost.
    fn lost(&self, inode: usize, cut: usize) -> usize {
        let ops = &self.ops[..cut.min(self.ops.len())];
        let lost = ops.iter().filter_map(|op| match op {
            Op::Lost { inode: of, before } if *of == inode => Some(*before),
            _ => None,
        });
        lost.max().unwrap_or(0)
    }
}

impl Journal {
    /// How much has happened.
    pub(crate) fn len(&self) -> usize {
        self.0.lock().ops.len()
    }

    /// The next sync of that file fails, and what it should have written is lost.
    pub(crate) fn fail_sync(&self, name: &str) {
        self.0.lock().failing.insert(name.to_owned());
    }

    /// Makes in `to` what a crash after `cut` operations may leave. `coin` decides what is there of
    /// everything that may be there or not.
    pub(crate) fn crash(
        &self,
        cut: usize,
        to: &Path,
        coin: &mut dyn FnMut() -> bool,
    ) -> io::Result<()> {
        let state = self.0.lock();
        let ops = &state.ops[..cut.min(state.ops.len())];
        let synced = ops.iter().filter_map(|op| match op {
            Op::FolderSynced { before } => Some(*before),
            _ => None,
        });
        let synced = synced.max().unwrap_or(0);
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, op) in ops.iter().enumerate() {
            let named = matches!(op, Op::Link { .. } | Op::Unlink(_) | Op::Rename(..));
            // Mostly on: else hardly anything would be left of long runs of changes.
            if named && index >= synced && !coin() && !coin() {
                break;
            }
            match op {
                Op::Link { name, inode } => {
                    names.insert(name, *inode);
                }
                Op::Unlink(name) => {
                    names.remove(name.as_str());
                }
                Op::Rename(from, to) => {
                    if let Some(inode) = names.remove(from.as_str()) {
                        names.insert(to, inode);
                    }
                }
                _ => {}
            }
        }
        for (name, inode) in names {
            let durable = state.durable(inode, cut);
            let lost = state.lost(inode, cut);
            let file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(to.join(name))?;
            for (index, op) in ops.iter().enumerate() {
                let sure = durable.contains(&index);
                if !sure && index < lost && !matches!(op, Op::Len { .. }) {
                    continue;
                }
                match op {
                    Op::Write {
                        inode: of,
                        offset,
                        bytes,
                    } if *of == inode => {
                        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                            if sure || coin() {
                                file.write_all_at(sector, offset + (number * SECTOR) as u64)?;
                            }
                        }
                    }
                    Op::Len { inode: of, len } if *of == inode && (sure || coin()) => {
                        file.set_len(*len)?;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}
