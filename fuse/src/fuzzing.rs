//! What the fuzz targets of `fuse/fuzz` do with their input, and the same as plain tests. Not a part
//! of the crate's interface.

use std::{collections::HashSet, os::unix::fs::FileExt as _};

use crate::{
    holder, mounts, process,
    sys::abi,
    table::{RecordIndex, Table, layout, scratch},
    transport,
};

/// A target's name and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 5] = [
    ("holder", holder_packet),
    ("table", table),
    ("landing", landing),
    ("helper", helper),
    ("proc", proc_files),
];

/// A packet between daemon and holder.
pub fn holder_packet(data: &[u8]) {
    holder::protocol::fuzz(data);
}

/// What a former daemon may have left in a table: pairs of an offset (4 bytes, into header, reader
/// slots, handles or records) and a word that is written there. The table is refused, or every
/// request found in it can be answered and the table goes on.
pub fn table(data: &[u8]) {
    let fd = scratch();
    let file = std::fs::File::from(fd.try_clone().expect("a descriptor"));
    let len = (layout::RECORDS_OFFSET + layout::SEGMENT_BYTES) as u64;
    for edit in data.chunks_exact(12).take(64) {
        let (at, word) = edit.split_at(4);
        let at = u64::from(u32::from_le_bytes(at.try_into().expect("4 bytes")));
        // Of each part of the table about as much.
        let (start, end) = match at & 3 {
            0 => (0, 512),
            1 => (layout::LANDING_OFFSET as u64, layout::HANDLES_OFFSET as u64),
            2 => (layout::HANDLES_OFFSET as u64, layout::RECORDS_OFFSET as u64),
            _ => (layout::RECORDS_OFFSET as u64, len),
        };
        let at = start + (at >> 2) * 8 % (end - start);
        file.write_all_at(word, at).expect("a write into memory");
    }
    let Ok(table) = Table::open(fd, 1 << 20) else {
        return;
    };
    let _ = (table.saved_init(), table.handles_lost());
    let Ok(open) = table.take_over() else {
        return;
    };
    let records: HashSet<RecordIndex> = open.iter().map(|(record, _)| *record).collect();
    assert_eq!(records.len(), open.len(), "one record for each request");
    for (record, request) in &open {
        let _ = (request.name(), request.wants_reply());
        assert!(table.free(*record), "every record can be freed");
        assert!(!table.free(*record), "once");
    }
    assert_eq!(table.take_over().expect("a table of ours"), []);
}

/// A request as the kernel sends it. What a record keeps of it comes back from a successor.
pub fn landing(data: &[u8]) {
    let fd = scratch();
    let file = std::fs::File::from(fd.try_clone().expect("a descriptor"));
    let range = layout::landing(0);
    let data = &data[..data.len().min(range.len())];
    file.write_all_at(data, range.start as u64)
        .expect("a write into memory");
    let table = Table::open(fd.try_clone().expect("a descriptor"), 1).expect("a new table");
    let Some(request) = table.landed(0) else {
        return;
    };
    if let Some(name) = request.name() {
        assert!(name.len() <= 64);
    }
    if request.opcode == abi::op::INIT
        && let Ok(negotiated) = transport::init::negotiate(&request.payload, 128 << 10)
    {
        table.save_init(&request.payload, &negotiated.reply);
        assert_eq!(table.saved_init(), Some(negotiated.reply));
    }
    if !request.wants_reply() {
        return;
    }
    let record = table.record(0, &request).expect("room for one");
    assert!(table.landed(0).is_none());
    drop(table);
    let next = Table::open(fd, 2).expect("the same table");
    assert_eq!(next.take_over().expect("it is sound"), [(record, request)]);
}

/// What the mount helper's two sides read from each other: written again, it is the same.
pub fn helper(data: &[u8]) {
    fn same<T: serde::Serialize + serde::de::DeserializeOwned>(data: &[u8]) {
        if let Ok(read) = serde_json::from_slice::<T>(data) {
            let text = serde_json::to_string(&read).expect("what was read can be written");
            let again: T = serde_json::from_str(&text).expect("what was written can be read");
            assert_eq!(serde_json::to_string(&again).expect("as before"), text);
        }
    }
    same::<mounts::request::Request>(data);
    same::<mounts::request::Response>(data);
    if let Ok(request) = serde_json::from_slice::<mounts::request::Request>(data) {
        let _ = (request.operation.name(), request.operation.target());
    }
}

/// Files below /proc: `mountinfo`, `stat`.
pub fn proc_files(data: &[u8]) {
    let mounts = mounts::parse_mountinfo(data);
    assert!(mounts.len() <= data.len() / 10);
    process::fuzz_stat(data);
}

#[cfg(test)]
#[path = "../../formats/fuzz/plain.rs"]
mod plain;

#[cfg(test)]
mod tests {
    use super::{TARGETS, plain};

    const HERE: &str = env!("CARGO_MANIFEST_DIR");

    #[test]
    fn seeds_and_their_parts() {
        plain::cut(HERE, &TARGETS);
    }

    #[test]
    fn damaged_seeds() {
        plain::damaged(HERE, &TARGETS, 5000);
    }

    #[test]
    fn noise() {
        plain::noise(&TARGETS, 500);
    }
}
