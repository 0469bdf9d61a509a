//! One entry of the TOC as its JSON spells it.

use core::fmt;
use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use crate::tree::Xattrs;

/// Fields that are absent are empty or 0, as the format's writers leave them out. Unknown fields
/// are ignored: readers of this format have always done so, and writers rely on it.
#[derive(Debug, Deserialize)]
pub(super) struct RawEntry<'a> {
    #[serde(borrow, default)]
    pub(super) name: Text<'a>,
    #[serde(borrow, default, rename = "type")]
    pub(super) kind: Text<'a>,
    #[serde(default)]
    pub(super) size: i64,
    #[serde(borrow, default)]
    pub(super) modtime: Text<'a>,
    #[serde(borrow, default, rename = "linkName")]
    pub(super) link_name: Text<'a>,
    #[serde(default)]
    pub(super) mode: i64,
    #[serde(default)]
    pub(super) uid: i64,
    #[serde(default)]
    pub(super) gid: i64,
    #[serde(default)]
    pub(super) offset: i64,
    #[serde(default, rename = "innerOffset")]
    pub(super) inner_offset: i64,
    #[serde(default, rename = "chunkOffset")]
    pub(super) chunk_offset: i64,
    #[serde(default, rename = "chunkSize")]
    pub(super) chunk_size: i64,
    #[serde(borrow, default)]
    pub(super) digest: Text<'a>,
    #[serde(borrow, default, rename = "chunkDigest")]
    pub(super) chunk_digest: Text<'a>,
    #[serde(default)]
    pub(super) xattrs: XattrMap,
    #[serde(default, rename = "devMajor")]
    pub(super) dev_major: i64,
    #[serde(default, rename = "devMinor")]
    pub(super) dev_minor: i64,
}

/// A string, borrowed from the JSON where it has no escapes; `null` is empty.
#[derive(Debug, Default)]
pub(super) struct Text<'a>(pub(super) Cow<'a, str>);

impl Text<'_> {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E>(self) -> Result<Text<'de>, E> {
                Ok(Text::default())
            }
        }

        deserializer.deserialize_any(TextVisitor)
    }
}

/// Extended attributes: names to base64 values; `null` is none.
#[derive(Debug, Default)]
pub(super) struct XattrMap(pub(super) Xattrs);

impl<'de> Deserialize<'de> for XattrMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;

        impl<'de> Visitor<'de> for MapVisitor {
            type Value = XattrMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of base64 strings")
            }

            fn visit_unit<E>(self) -> Result<XattrMap, E> {
                Ok(XattrMap::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<XattrMap, A::Error> {
                let mut xattrs = Xattrs::new();
                while let Some((name, value)) = map.next_entry::<Text<'de>, Text<'de>>()? {
                    let value = STANDARD
                        .decode(value.as_bytes())
                        .map_err(|_| A::Error::custom("an xattr value is not base64"))?;
                    xattrs.insert(name.0.into_owned().into_bytes(), value);
                }
                Ok(XattrMap(xattrs))
            }
        }

        deserializer.deserialize_any(MapVisitor)
    }
}
