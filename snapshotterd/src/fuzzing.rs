//! What the fuzz targets of `snapshotterd/fuzz` do with their input, and the same as plain tests.
//! Not a part of the crate's interface.

use std::collections::BTreeMap;

use crate::{
    admin::Query,
    config::{Config, Overrides},
    layers::record::{LayerRecord, LazySnapshot},
    lock,
    resolve::labels::Announced,
    store::{Info, Kind, filter::Filter, now, schema},
};

/// A target's name and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 6] = [
    ("config", config),
    ("labels", labels),
    ("filter", filter),
    ("records", records),
    ("query", query),
    ("lock", lock_files),
];

/// A configuration file: what was read is written and read again.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match Config::parse(text, &Overrides::default()) {
        Ok(config) => {
            let dumped = config.dump().expect("what was read can be written");
            let again = Config::parse(&dumped, &Overrides::default())
                .unwrap_or_else(|error| panic!("{error}\n{dumped}"));
            assert_eq!(again.dump().expect("as before"), dumped);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Labels of a Prepare, `name=value` a line.
pub fn labels(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let labels: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    match Announced::from_labels(&labels) {
        Ok(announced) => {
            assert!(announced.layers.len() <= 129);
            assert!(announced.times(announced.layer) >= 1);
            assert!(!announced.image.is_empty());
        }
        Err(reason) => assert!(reason.to_string().len() <= 4096),
    }
}

/// Filters of a List, one a line.
pub fn filter(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let filters: Vec<&str> = text.lines().take(8).collect();
    let info = Info {
        name: "default/1/extract-1 sha256:ab".to_owned(),
        parent: None,
        kind: Kind::Active,
        created: now(),
        updated: now(),
        labels: BTreeMap::from([("a.b/c".to_owned(), "x y".to_owned())]),
    };
    match Filter::parse(&filters) {
        Ok(filter) => {
            let _ = filter.matches(&info);
            // The same alternatives in another order match the same.
            let turned: Vec<&str> = filters.iter().rev().copied().collect();
            let turned = Filter::parse(&turned).expect("each of them parses");
            assert_eq!(turned.matches(&info), filter.matches(&info));
        }
        Err(error) => {
            assert!(error.filter.len() <= 1000);
            assert!(error.offset <= text.len());
        }
    }
}

/// Records of the store.
pub fn records(data: &[u8]) {
    fn same<T>(data: &[u8])
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        if let Ok(read) = serde_json::from_slice::<T>(data) {
            let text = serde_json::to_vec(&read).expect("what was read can be written");
            let again: T = serde_json::from_slice(&text).expect("what was written can be read");
            assert_eq!(again, read);
        }
    }
    schema::fuzz(data);
    same::<LayerRecord>(data);
    same::<LazySnapshot>(data);
}

/// The query of an admin request.
pub fn query(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let query = Query::parse(&text);
    for name in ["ref", "key", ""] {
        // U+FFFD takes three bytes where an escape took three.
        assert!(query.value(name).unwrap_or_default().len() <= text.len());
    }
}

/// Lock files, and what /proc says about their holders.
pub fn lock_files(data: &[u8]) {
    lock::fuzz(data);
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
        plain::noise(&TARGETS, 1000);
    }
}
