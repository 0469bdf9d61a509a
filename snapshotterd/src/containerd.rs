//! A client of the containerd that hosts us: its version, blobs of its content store, its images.
//!
//! Everything here is optional: without an address, or while containerd does not answer, manifests
//! come from the registry. Calls are bounded, and the channel reconnects by itself.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use formats::digest::Digest;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::api::{
    content::{ReadContentRequest, content_client::ContentClient},
    images::{GetImageRequest, ListImagesRequest, images_client::ImagesClient},
    version::version_client::VersionClient,
};

/// No call to containerd may take longer.
const CALL_LIMIT: Duration = Duration::from_secs(2);

/// Why containerd could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerdError {
    /// The call failed.
    #[error("containerd at {address}: {what}")]
    Call {
        /// The socket.
        address: String,
        /// What was asked for.
        what: String,
        /// Its answer.
        #[source]
        status: Box<Status>,
    },
    /// The call took too long.
    #[error("containerd at {address} did not answer {what} within {} s", CALL_LIMIT.as_secs())]
    Slow {
        /// The socket.
        address: String,
        /// What was asked for.
        what: String,
    },
    /// The namespace cannot be sent.
    #[error("{0:?} is no namespace")]
    Namespace(String),
    /// A blob is larger than expected.
    #[error("containerd's copy of {digest} has more than {limit} bytes")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// The bound.
        limit: u64,
    },
    /// A blob is not what its name says.
    #[error("containerd's copy of {expected} has digest {actual}")]
    Digest {
        /// The name.
        expected: Digest,
        /// The content.
        actual: Digest,
    },
}

/// An image containerd knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The name, usually a full reference.
    pub name: String,
    /// Digest of the index or manifest.
    pub target: Digest,
    /// Its media type.
    pub media_type: String,
}

/// A client of one containerd.
#[derive(Clone, Debug)]
pub struct Containerd {
    address: PathBuf,
    channel: Channel,
}

impl Containerd {
    /// A client of the containerd behind the unix socket `address`. Connects when first used; must
    /// be called within a tokio runtime.
    pub fn new(address: impl Into<PathBuf>) -> Self {
        let address = address.into();
        let path = address.clone();
        let channel = Endpoint::from_static("http://containerd")
            .connect_timeout(CALL_LIMIT)
            .connect_with_connector_lazy(service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }));
        Self { address, channel }
    }

    /// The socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// containerd's version, for example `v2.4.2`.
    pub async fn version(&self) -> Result<String, ContainerdError> {
        let mut client = VersionClient::new(self.channel.clone());
        let reply = self.bounded("its version", client.version(())).await?;
        Ok(reply.into_inner().version)
    }

    /// A small blob of the content store; `None` if it is not there.
    pub async fn blob(
        &self,
        namespace: &str,
        digest: Digest,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, ContainerdError> {
        let what = digest.to_string();
        let read = async {
            let mut client = ContentClient::new(self.channel.clone());
            let request = ReadContentRequest {
                digest: what.clone(),
                offset: 0,
                size: 0,
            };
            let request = in_namespace(namespace, request).map_err(Status::invalid_argument)?;
            let mut stream = match client.read(request).await {
                Ok(reply) => reply.into_inner(),
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                Err(status) => return Err(status),
            };
            let mut data = Vec::new();
            loop {
                match stream.message().await {
                    Ok(Some(part)) => data.extend_from_slice(&part.data),
                    Ok(None) => break,
                    Err(status) if status.code() == Code::NotFound => return Ok(None),
                    Err(status) => return Err(status),
                }
                if data.len() as u64 > limit {
                    break;
                }
            }
            Ok(Some(data))
        };
        let Some(data) = self.bounded(&what, read).await? else {
            return Ok(None);
        };
        if data.len() as u64 > limit {
            return Err(ContainerdError::TooLarge { digest, limit });
        }
        let actual = Digest::of(&data);
        if actual != digest {
            return Err(ContainerdError::Digest {
                expected: digest,
                actual,
            });
        }
        Ok(Some(data))
    }

    /// The image of that name; `None` if there is none.
    pub async fn image(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Image>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = in_namespace(
            namespace,
            GetImageRequest {
                name: name.to_owned(),
            },
        )
        .map_err(ContainerdError::Namespace)?;
        let get = async {
            match client.get(request).await {
                Ok(reply) => Ok(reply.into_inner().image),
                Err(status) if status.code() == Code::NotFound => Ok(None),
                Err(status) => Err(status),
            }
        };
        let found = self.bounded(&format!("image {name}"), get).await?;
        Ok(found.and_then(image))
    }

    /// All images of a namespace.
    pub async fn images(&self, namespace: &str) -> Result<Vec<Image>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = in_namespace(
            namespace,
            ListImagesRequest {
                filters: Vec::new(),
            },
        )
        .map_err(ContainerdError::Namespace)?;
        let reply = self.bounded("its images", client.list(request)).await?;
        Ok(reply
            .into_inner()
            .images
            .into_iter()
            .filter_map(image)
            .collect())
    }

    async fn bounded<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ContainerdError> {
        let address = || self.address.display().to_string();
        match tokio::time::timeout(CALL_LIMIT, call).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(status)) => Err(ContainerdError::Call {
                address: address(),
                what: what.to_owned(),
                status: Box::new(status),
            }),
            Err(_) => Err(ContainerdError::Slow {
                address: address(),
                what: what.to_owned(),
            }),
        }
    }
}

fn image(image: crate::api::images::Image) -> Option<Image> {
    let target = image.target?;
    Some(Image {
        name: image.name,
        target: target.digest.parse().ok()?,
        media_type: target.media_type,
    })
}

fn in_namespace<T>(namespace: &str, message: T) -> Result<Request<T>, String> {
    let value = MetadataValue::try_from(namespace).map_err(|_| namespace.to_owned())?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}
