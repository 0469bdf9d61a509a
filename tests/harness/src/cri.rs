//! A small CRI client: what kubelet does to pull an image and run a container.
//!
//! Messages hold only the fields used here; numbers are those of `runtime.v1` in
//! `k8s.io/cri-api`.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

/// An image reference.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageSpec {
    /// Reference or id.
    #[prost(string, tag = "1")]
    pub image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RemoveImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NamespaceOption {
    /// 2 = NODE.
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxSecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxPodSandboxConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<SandboxSecurityContext>,
}

/// A pod.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxId {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerSecurityContext {
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxContainerConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<ContainerSecurityContext>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainerConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerId {
    #[prost(string, tag = "1")]
    container_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

/// State of a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerStatus {
    /// 0 created, 1 running, 2 exited.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Exit code once exited.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    /// Why, for errors.
    #[prost(string, tag = "11")]
    pub message: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

/// Result of a command in a container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecSyncResponse {
    /// Its standard output.
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    /// Its standard error.
    #[prost(bytes = "vec", tag = "2")]
    pub stderr: Vec<u8>,
    /// Its exit code.
    #[prost(int32, tag = "3")]
    pub exit_code: i32,
}

/// A CRI connection.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
}

impl Cri {
    /// Connects to containerd's socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let uri = format!("unix://{}", socket.display());
        let channel = Endpoint::from_shared(uri)?
            .connect()
            .await
            .context("CRI socket")?;
        Ok(Self { channel })
    }

    async fn call<Q, A>(&self, path: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut client = Grpc::new(self.channel.clone());
        client.ready().await?;
        let mut request = Request::new(request);
        request.set_timeout(Duration::from_secs(120));
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let answer = client
            .unary(request, PathAndQuery::from_static(path), codec)
            .await;
        Ok(answer
            .map_err(|status| anyhow::anyhow!("{path}: {:?}: {}", status.code(), status.message()))?
            .into_inner())
    }

    /// `PullImage`; returns the image id.
    pub async fn pull_image(&self, image: &str, pod: Option<PodSandboxConfig>) -> Result<String> {
        let image = Some(ImageSpec {
            image: image.to_owned(),
        });
        let request = PullImageRequest {
            image,
            sandbox_config: pod,
        };
        let answer: PullImageResponse = self
            .call("/runtime.v1.ImageService/PullImage", request)
            .await?;
        Ok(answer.image_ref)
    }

    /// `RemoveImage`.
    pub async fn remove_image(&self, image: &str) -> Result<()> {
        let request = RemoveImageRequest {
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
        };
        let _: Empty = self
            .call("/runtime.v1.ImageService/RemoveImage", request)
            .await?;
        Ok(())
    }

    /// `RunPodSandbox` of a host-network pod; returns its id.
    pub async fn run_sandbox(&self, pod: &PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: Some(pod.clone()),
        };
        let answer: SandboxId = self
            .call("/runtime.v1.RuntimeService/RunPodSandbox", request)
            .await?;
        Ok(answer.pod_sandbox_id)
    }

    /// `CreateContainer` and `StartContainer`; returns the container's id.
    pub async fn start_container(
        &self,
        sandbox: &str,
        pod: &PodSandboxConfig,
        name: &str,
        image: &str,
        command: &[&str],
    ) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
            }),
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(ContainerSecurityContext {
                    namespace_options: Some(NamespaceOption { network: 2 }),
                }),
            }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod.clone()),
        };
        let created: ContainerId = self
            .call("/runtime.v1.RuntimeService/CreateContainer", request)
            .await?;
        let _: Empty = self
            .call("/runtime.v1.RuntimeService/StartContainer", created.clone())
            .await?;
        Ok(created.container_id)
    }

    /// `ContainerStatus`.
    pub async fn status(&self, container: &str) -> Result<ContainerStatus> {
        let request = ContainerId {
            container_id: container.to_owned(),
        };
        let answer: ContainerStatusResponse = self
            .call("/runtime.v1.RuntimeService/ContainerStatus", request)
            .await?;
        answer.status.context("a status")
    }

    /// Waits until the container has exited.
    pub async fn wait(&self, container: &str, limit: Duration) -> Result<ContainerStatus> {
        tokio::time::timeout(limit, async {
            loop {
                let status = self.status(container).await?;
                if status.state == 2 {
                    return Ok(status);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .context("the container did not exit")?
    }

    /// `ExecSync`.
    pub async fn exec(&self, container: &str, command: &[&str]) -> Result<ExecSyncResponse> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd,
            timeout: 60,
        };
        self.call("/runtime.v1.RuntimeService/ExecSync", request)
            .await
    }

    /// `StopPodSandbox` and `RemovePodSandbox`.
    pub async fn remove_sandbox(&self, sandbox: &str) -> Result<()> {
        let request = SandboxId {
            pod_sandbox_id: sandbox.to_owned(),
        };
        let _: Empty = self
            .call("/runtime.v1.RuntimeService/StopPodSandbox", request.clone())
            .await?;
        let _: Empty = self
            .call("/runtime.v1.RuntimeService/RemovePodSandbox", request)
            .await?;
        Ok(())
    }
}

/// A host-network pod that logs into `log_directory`.
pub fn pod(name: &str, log_directory: &Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
        }),
        log_directory: log_directory.display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(SandboxSecurityContext {
                namespace_options: Some(NamespaceOption { network: 2 }),
            }),
        }),
    }
}
