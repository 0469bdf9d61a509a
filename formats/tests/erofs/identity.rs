//! Writer then reader is identity, and no bytes make the reader panic.

use formats::{
    erofs::{Image, write},
    limits::Limits,
};
use proptest::prelude::*;

use crate::generate;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_was_written_is_read((tree, device_len) in generate::tree()) {
        let image = write(&tree, device_len).unwrap();
        let opened = Image::open(&image).unwrap();
        prop_assert_eq!(opened.device_len(), Some(device_len));
        prop_assert_eq!(opened.inode_count(), tree.inodes().len() as u64);
        let read = opened.tree(&Limits::default()).unwrap();
        prop_assert_eq!(&read, &tree);
        prop_assert_eq!(write(&read, device_len).unwrap(), image);
    }

    #[test]
    fn a_damaged_image_is_read_or_refused(
        (tree, device_len) in generate::tree(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut image = write(&tree, device_len).unwrap();
        for (at, byte) in damage {
            let at = at.index(image.len());
            image[at] = byte;
        }
        // Without the checksum the damage reaches the parser behind it.
        image[1024 + 8] &= !1;
        let limits = Limits { max_entries: 10_000, ..Limits::default() };
        if let Ok(opened) = Image::open(&image) {
            let _ = opened.tree(&limits);
        }
        let cut = cut.index(image.len());
        if let Ok(opened) = Image::open(&image[..cut]) {
            let _ = opened.tree(&limits);
        }
    }
}
