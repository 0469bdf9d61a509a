//! Image documents: writer then reader is identity, and no bytes make a reader panic.

use std::collections::BTreeMap;

use formats::{
    digest::Digest,
    oci::{
        ContainerConfig, Descriptor, Document, History, ImageConfig, Index, Manifest, OciLayout,
        Platform, media_type,
    },
};
use proptest::{collection::vec, prelude::*};

fn strings() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map("[a-z./]{1,12}", any::<String>(), 0..4)
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    (any::<String>(), any::<[u8; 32]>(), any::<u64>(), strings()).prop_map(
        |(media_type, digest, size, annotations)| Descriptor {
            annotations,
            ..Descriptor::new(media_type, Digest::from_bytes(digest), size)
        },
    )
}

fn platform() -> impl Strategy<Value = Platform> {
    let word = || prop_oneof!["[a-z0-9]{1,8}", any::<String>()];
    (word(), word(), prop::option::of(word())).prop_map(|(os, architecture, variant)| Platform {
        os,
        architecture,
        variant,
        ..Platform::default()
    })
}

fn manifest() -> impl Strategy<Value = Manifest> {
    (descriptor(), vec(descriptor(), 0..5), strings()).prop_map(|(config, layers, annotations)| {
        Manifest {
            annotations,
            ..Manifest::new(config, layers)
        }
    })
}

fn index() -> impl Strategy<Value = Index> {
    let entry = (descriptor(), prop::option::of(platform()));
    vec(entry, 0..5).prop_map(|entries| {
        let manifests = entries
            .into_iter()
            .map(|(descriptor, platform)| Descriptor {
                platform,
                ..descriptor
            });
        Index::new(manifests.collect())
    })
}

fn config() -> impl Strategy<Value = ImageConfig> {
    let words = || vec(any::<String>(), 0..3);
    let container = (
        any::<String>(),
        words(),
        prop::option::of(words()),
        prop::option::of(words()),
        strings(),
    )
        .prop_map(|(user, env, entrypoint, cmd, labels)| ContainerConfig {
            user,
            env,
            entrypoint,
            cmd,
            labels,
            ..ContainerConfig::default()
        });
    let history =
        (prop::option::of(any::<String>()), any::<bool>()).prop_map(|(created_by, empty_layer)| {
            History {
                created_by,
                empty_layer,
                ..History::default()
            }
        });
    let diff_ids = vec(any::<[u8; 32]>().prop_map(Digest::from_bytes), 0..4);
    (container, vec(history, 0..3), diff_ids, any::<String>()).prop_map(
        |(container, history, diff_ids, os)| {
            let mut config = ImageConfig {
                os,
                config: container,
                history,
                ..ImageConfig::default()
            };
            config.rootfs.diff_ids = diff_ids;
            config
        },
    )
}

proptest! {
    #[test]
    fn what_was_written_is_read(manifest in manifest(), index in index(), config in config()) {
        let read = Document::parse(&manifest.to_json(), Some(media_type::OCI_MANIFEST)).unwrap();
        prop_assert_eq!(read, Document::Manifest(manifest));
        let read = Document::parse(&index.to_json(), None).unwrap();
        prop_assert_eq!(read, Document::Index(index));
        prop_assert_eq!(ImageConfig::parse(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn damaged_documents_are_read_or_refused(
        manifest in manifest(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = manifest.to_json();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        let _ = Document::parse(&bytes, None);
        let _ = ImageConfig::parse(&bytes);
        let _ = OciLayout::parse(&bytes);
    }
}
