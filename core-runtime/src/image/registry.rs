//! One image in a registry.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use formats::oci::Descriptor;
use storage::{
    ranges::{FileSource, MemorySource, RangeSource},
    registry::{Reference, RegistryClient},
    source::Cause,
};

use super::{ImageError, Progress};

/// Configs are smaller; layers are never read into memory.
const MAX_BYTES: u64 = 16 << 20;

/// Shared access to registries.
#[derive(Clone, Debug)]
pub struct RegistryAccess {
    client: RegistryClient,
}

impl RegistryAccess {
    /// Uses one client, and so one connection pool, for all images.
    pub fn new(client: RegistryClient) -> Self {
        Self { client }
    }

    pub(super) fn store(&self, reference: &Reference) -> RegistryStore {
        RegistryStore {
            client: self.client.clone(),
            reference: reference.clone(),
        }
    }
}

/// An image reference and the client that reaches it.
#[derive(Debug)]
pub struct RegistryStore {
    client: RegistryClient,
    reference: Reference,
}

impl RegistryStore {
    pub(super) fn place(&self) -> String {
        self.reference.to_string()
    }

    pub(super) async fn root(&self) -> Result<(Descriptor, Vec<u8>), ImageError> {
        let found = self.client.resolve(&self.reference).await?;
        let descriptor = Descriptor::new(found.media_type, found.digest, found.bytes.len() as u64);
        Ok((descriptor, found.bytes.to_vec()))
    }

    pub(super) async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let found = self
            .client
            .manifest_by_digest(self.reference.repository(), descriptor.digest)
            .await?;
        Ok(found.bytes.to_vec())
    }

    pub(super) async fn bytes(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        if descriptor.size > MAX_BYTES {
            return Err(ImageError::Corrupt {
                place: self.place(),
                digest: descriptor.digest,
                detail: format!("{} bytes are too many for a config", descriptor.size),
            });
        }
        let repository = self.reference.repository();
        let bytes = self
            .client
            .small_blob(
                repository,
                descriptor.digest,
                descriptor.size,
                Cause::Metadata,
            )
            .await?;
        Ok(bytes.to_vec())
    }

    pub(super) fn range_source(&self, descriptor: &Descriptor) -> Arc<dyn RangeSource> {
        Arc::new(self.client.blob(
            self.reference.repository(),
            descriptor.digest,
            descriptor.size,
        ))
    }

    pub(super) async fn download(
        &self,
        descriptor: &Descriptor,
        scratch: &Path,
        progress: Progress<'_>,
    ) -> Result<PathBuf, ImageError> {
        let path = scratch.join(descriptor.digest.hex());
        let failed = |source| ImageError::File {
            path: path.clone(),
            source,
        };
        let mut file = std::fs::File::create(&path).map_err(failed)?;
        let repository = self.reference.repository();
        let mut body = self
            .client
            .whole_blob(
                repository,
                descriptor.digest,
                descriptor.size,
                Cause::Demand,
            )
            .await?;
        while let Some(chunk) = body.next_chunk().await? {
            file.write_all(&chunk).map_err(failed)?;
            progress(chunk.len() as u64);
        }
        Ok(path)
    }

    pub(super) async fn upload(
        &self,
        descriptor: &Descriptor,
        file: &Path,
        progress: Progress<'_>,
    ) -> Result<(), ImageError> {
        let source = FileSource::open(file).map_err(|source| ImageError::File {
            path: file.to_owned(),
            source,
        })?;
        self.client
            .push_blob(
                self.reference.repository(),
                descriptor.digest,
                Arc::new(source),
                None,
            )
            .await?;
        progress(descriptor.size);
        Ok(())
    }

    pub(super) async fn upload_bytes(
        &self,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        let source = MemorySource::new("the config", Bytes::copy_from_slice(bytes));
        self.client
            .push_blob(
                self.reference.repository(),
                descriptor.digest,
                Arc::new(source),
                None,
            )
            .await?;
        Ok(())
    }

    pub(super) async fn put_manifest(
        &self,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        self.client
            .push_manifest(
                &self.reference,
                &descriptor.media_type,
                Bytes::copy_from_slice(bytes),
            )
            .await?;
        Ok(())
    }
}
