//! Platforms of an index and which of them this machine runs.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `platform` of a descriptor in an index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture in Go's names (`amd64`, `arm64`).
    #[serde(default)]
    pub architecture: String,
    /// Operating system in Go's names.
    #[serde(default)]
    pub os: String,
    /// Variant of the CPU (`v7`, `v3`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Everything else (`os.version`, `os.features`).
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The machine images are chosen for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlatform {
    os: String,
    architecture: String,
    /// Number of the CPU variant (`v3` is 3); the lowest of the architecture when not known.
    variant: u32,
}

impl HostPlatform {
    /// The platform this program was built for. CPU variants are not probed: the baseline of the
    /// architecture is assumed (amd64 v1, arm64 v8, arm v7).
    pub fn current() -> Self {
        let platform = Platform {
            architecture: std::env::consts::ARCH.to_owned(),
            os: std::env::consts::OS.to_owned(),
            ..Platform::default()
        };
        let (os, architecture, variant) = normalise(&platform);
        Self {
            os,
            architecture,
            variant,
        }
    }

    /// A named platform, `os/architecture[/variant]`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        let platform = Platform {
            os: parts.next()?.to_owned(),
            architecture: parts.next()?.to_owned(),
            variant: parts.next().map(str::to_owned),
            extra: Map::new(),
        };
        let complete = !platform.os.is_empty() && !platform.architecture.is_empty();
        let (os, architecture, variant) = normalise(&platform);
        (complete && parts.next().is_none()).then_some(Self {
            os,
            architecture,
            variant,
        })
    }

    /// How well `platform` fits: 0 is best, `None` does not run here.
    pub fn rank(&self, platform: &Platform) -> Option<u32> {
        let (os, architecture, variant) = normalise(platform);
        if os != self.os {
            return None;
        }
        if architecture == self.architecture {
            return self.variant.checked_sub(variant);
        }
        // 32-bit programs of the same CPU family come after everything native.
        match (self.architecture.as_str(), architecture.as_str()) {
            ("amd64", "386") => Some(100),
            ("arm64", "arm") => 8_u32.checked_sub(variant).map(|rank| 100 + rank),
            _ => None,
        }
    }

    /// The best of several descriptors' platforms. One without a platform is taken when no other
    /// fits: its config will tell. The first of equals wins.
    pub fn choose<'a, T>(
        &self,
        candidates: impl IntoIterator<Item = (Option<&'a Platform>, T)>,
    ) -> Option<T> {
        candidates
            .into_iter()
            .filter_map(|(platform, value)| {
                let rank = platform.map_or(Some(u32::MAX), |platform| self.rank(platform))?;
                Some((rank, value))
            })
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, value)| value)
    }
}

impl core::fmt::Display for HostPlatform {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match (self.architecture.as_str(), self.variant) {
            ("amd64", 1) | ("arm64", 8) | (_, 0) => Ok(()),
            (_, variant) => write!(f, "/v{variant}"),
        }
    }
}

impl core::fmt::Display for Platform {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

fn normalise(platform: &Platform) -> (String, String, u32) {
    let os = match platform.os.to_ascii_lowercase().as_str() {
        "macos" => "darwin".to_owned(),
        other => other.to_owned(),
    };
    let named = platform.architecture.to_ascii_lowercase();
    let architecture = match named.as_str() {
        "x86_64" | "x86-64" | "amd64" => "amd64",
        "aarch64" | "arm64" => "arm64",
        "x86" | "i386" | "i486" | "i586" | "i686" | "386" => "386",
        "armhf" | "armel" | "arm" => "arm",
        "powerpc64le" | "ppc64le" => "ppc64le",
        "loongarch64" | "loong64" => "loong64",
        other => other,
    };
    let baseline = match (architecture, named.as_str()) {
        ("amd64", _) => 1,
        ("arm64", _) => 8,
        ("arm", "armel") => 6,
        ("arm", _) => 7,
        _ => 0,
    };
    let variant = platform
        .variant
        .as_deref()
        .map(|text| text.trim_start_matches(['v', 'V']))
        .filter(|text| !text.is_empty())
        // An unreadable variant ("v8.2-a") fits nothing rather than everything.
        .map_or(baseline, |text| text.parse().unwrap_or(u32::MAX));
    (os, architecture.to_owned(), variant)
}
