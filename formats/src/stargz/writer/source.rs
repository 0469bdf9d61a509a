//! The tar archive that is converted, as an index and by position.

use std::io::{Read, Seek, SeekFrom};

use super::WriteError;
use crate::{
    limits::Limits,
    stargz::{TOC_TAR_NAME, landmark::is_landmark_name},
    tar::{EntryType, Event, Header, Parser},
    tree::TreePath,
};

/// One entry.
pub(super) struct Item {
    /// Its cleaned path.
    pub(super) path: TreePath,
    pub(super) header: Box<Header>,
}

pub(super) struct Source<R> {
    tar: R,
    /// Where `tar` stands, as far as it is known.
    position: Option<u64>,
}

impl<R: Read + Seek> Source<R> {
    pub(super) fn new(tar: R) -> Self {
        Self {
            tar,
            position: None,
        }
    }

    /// Reads the whole archive and keeps its headers, without landmarks and an earlier TOC.
    pub(super) fn index(&mut self, limits: &Limits) -> Result<Vec<Item>, WriteError> {
        self.seek(0)?;
        let mut parser = Parser::new(*limits);
        let mut items = Vec::new();
        let mut buffer = vec![0; 128 << 10];
        let mut offset = 0;
        loop {
            let len = match self.tar.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => len,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(WriteError::Read { offset, source }),
            };
            offset += len as u64;
            let mut bytes = &buffer[..len];
            while let Some(event) = parser.next_event(&mut bytes)? {
                if let Event::Entry(header) = event {
                    if items.len() as u64 == u64::from(limits.max_entries) {
                        return Err(WriteError::TooManyEntries {
                            limit: limits.max_entries,
                        });
                    }
                    items.extend(keep(header)?);
                }
            }
        }
        parser.finish()?;
        self.position = Some(offset);
        Ok(items)
    }

    pub(super) fn seek(&mut self, to: u64) -> Result<(), WriteError> {
        if self.position != Some(to) {
            self.tar
                .seek(SeekFrom::Start(to))
                .map_err(|source| WriteError::Read { offset: to, source })?;
            self.position = Some(to);
        }
        Ok(())
    }

    pub(super) fn read_exact(&mut self, to: &mut [u8]) -> Result<(), WriteError> {
        let offset = self.position.take().unwrap_or_default();
        self.tar
            .read_exact(to)
            .map_err(|source| WriteError::Read { offset, source })?;
        self.position = Some(offset + to.len() as u64);
        Ok(())
    }
}

fn keep(header: Box<Header>) -> Result<Option<Item>, WriteError> {
    let path = TreePath::clean(&header.path);
    if is_landmark_name(path.as_bytes()) || path.as_bytes() == TOC_TAR_NAME.as_bytes() {
        return Ok(None);
    }
    if header.sparse {
        return Err(WriteError::Sparse { path });
    }
    if let EntryType::Other(flag) = header.kind {
        return Err(WriteError::Type {
            path,
            flag: char::from(flag),
        });
    }
    Ok(Some(Item { path, header }))
}
