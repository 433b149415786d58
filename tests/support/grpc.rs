//! The two gRPC services the tests call, by hand: messages as prost structs with the field numbers of the public protocols, and only
//! the fields that are used. (Unknown fields are skipped, so this stays compatible.)

use super::registry::runtime;
use hyper_util::rt::TokioIo;
use prost::Message;
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};

/// A channel to a service at a unix socket.
#[derive(Clone)]
pub struct Client(Channel);

impl Client {
    pub fn connect(socket: &Path) -> Client {
        let path = socket.to_path_buf();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let _guard = runtime().enter();
        Client(
            Endpoint::from_static("http://unix.socket")
                .timeout(Duration::from_secs(600))
                .connect_with_connector_lazy(connector),
        )
    }

    /// A unary call in containerd's default namespace.
    pub fn call<Q, R>(&self, method: &'static str, request: Q) -> Result<R, tonic::Status>
    where
        Q: Message + Default + 'static,
        R: Message + Default + 'static,
    {
        runtime().block_on(async {
            let mut grpc = tonic::client::Grpc::new(self.0.clone());
            grpc.ready().await.map_err(|e| tonic::Status::unavailable(e.to_string()))?;
            let mut request = tonic::Request::new(request);
            request.metadata_mut().insert("containerd-namespace", "default".parse().expect("ASCII"));
            let codec = tonic_prost::ProstCodec::default();
            grpc.unary(request, http::uri::PathAndQuery::from_static(method), codec)
                .await
                .map(tonic::Response::into_inner)
        })
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

/// `containerd.services.snapshots.v1`
pub mod snapshots {
    use super::*;

    pub const PREPARE: &str = "/containerd.services.snapshots.v1.Snapshots/Prepare";
    pub const VIEW: &str = "/containerd.services.snapshots.v1.Snapshots/View";
    pub const MOUNTS: &str = "/containerd.services.snapshots.v1.Snapshots/Mounts";
    pub const COMMIT: &str = "/containerd.services.snapshots.v1.Snapshots/Commit";
    pub const REMOVE: &str = "/containerd.services.snapshots.v1.Snapshots/Remove";
    pub const STAT: &str = "/containerd.services.snapshots.v1.Snapshots/Stat";
    pub const USAGE: &str = "/containerd.services.snapshots.v1.Snapshots/Usage";

    /// Also the request of View.
    #[derive(Clone, PartialEq, Message)]
    pub struct Prepare {
        #[prost(string, tag = "1")]
        pub snapshotter: String,
        #[prost(string, tag = "2")]
        pub key: String,
        #[prost(string, tag = "3")]
        pub parent: String,
        #[prost(map = "string, string", tag = "4")]
        pub labels: HashMap<String, String>,
    }

    /// The answer of Prepare, View and Mounts.
    #[derive(Clone, PartialEq, Message)]
    pub struct Mounts {
        #[prost(message, repeated, tag = "1")]
        pub mounts: Vec<Mount>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Mount {
        #[prost(string, tag = "1")]
        pub r#type: String,
        #[prost(string, tag = "2")]
        pub source: String,
        #[prost(string, tag = "3")]
        pub target: String,
        #[prost(string, repeated, tag = "4")]
        pub options: Vec<String>,
    }

    /// The request of Mounts, Remove, Stat and Usage.
    #[derive(Clone, PartialEq, Message)]
    pub struct Key {
        #[prost(string, tag = "1")]
        pub snapshotter: String,
        #[prost(string, tag = "2")]
        pub key: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Commit {
        #[prost(string, tag = "1")]
        pub snapshotter: String,
        #[prost(string, tag = "2")]
        pub name: String,
        #[prost(string, tag = "3")]
        pub key: String,
        #[prost(map = "string, string", tag = "4")]
        pub labels: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Stat {
        #[prost(message, optional, tag = "1")]
        pub info: Option<Info>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Info {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub parent: String,
        /// 1 view, 2 active, 3 committed
        #[prost(int32, tag = "3")]
        pub kind: i32,
        #[prost(map = "string, string", tag = "6")]
        pub labels: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Usage {
        #[prost(int64, tag = "1")]
        pub size: i64,
        #[prost(int64, tag = "2")]
        pub inodes: i64,
    }

    pub fn prepare(
        client: &Client,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, tonic::Status> {
        let request = Prepare { snapshotter: "soci".into(), key: key.into(), parent: parent.into(), labels };
        client.call::<_, Mounts>(PREPARE, request).map(|m| m.mounts)
    }

    pub fn mounts(client: &Client, key: &str) -> Result<Vec<Mount>, tonic::Status> {
        client.call::<_, Mounts>(MOUNTS, self::key(key)).map(|m| m.mounts)
    }

    pub fn stat(client: &Client, key: &str) -> Result<Info, tonic::Status> {
        client.call::<_, Stat>(STAT, self::key(key)).map(|s| s.info.unwrap_or_default())
    }

    pub fn remove(client: &Client, key: &str) -> Result<(), tonic::Status> {
        client.call::<_, Empty>(REMOVE, self::key(key)).map(|_| ())
    }

    pub fn usage(client: &Client, key: &str) -> Result<Usage, tonic::Status> {
        client.call(USAGE, self::key(key))
    }

    fn key(key: &str) -> Key {
        Key { snapshotter: "soci".into(), key: key.into() }
    }
}

/// `runtime.v1`: the kubelet's side of CRI.
pub mod cri {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    pub struct PodSandboxMetadata {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub uid: String,
        #[prost(string, tag = "3")]
        pub namespace: String,
    }

    /// `network`: 2 is the node's.
    #[derive(Clone, PartialEq, Message)]
    pub struct NamespaceOption {
        #[prost(int32, tag = "1")]
        pub network: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct LinuxSandboxSecurityContext {
        #[prost(message, optional, tag = "1")]
        pub namespace_options: Option<NamespaceOption>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct LinuxPodSandboxConfig {
        #[prost(string, tag = "1")]
        pub cgroup_parent: String,
        #[prost(message, optional, tag = "2")]
        pub security_context: Option<LinuxSandboxSecurityContext>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct PodSandboxConfig {
        #[prost(message, optional, tag = "1")]
        pub metadata: Option<PodSandboxMetadata>,
        #[prost(string, tag = "2")]
        pub hostname: String,
        #[prost(string, tag = "3")]
        pub log_directory: String,
        #[prost(message, optional, tag = "8")]
        pub linux: Option<LinuxPodSandboxConfig>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct RunPodSandboxRequest {
        #[prost(message, optional, tag = "1")]
        pub config: Option<PodSandboxConfig>,
    }

    /// Every request or answer that is one id or reference.
    #[derive(Clone, PartialEq, Message)]
    pub struct Id {
        #[prost(string, tag = "1")]
        pub id: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ImageSpec {
        #[prost(string, tag = "1")]
        pub image: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct AuthConfig {
        #[prost(string, tag = "1")]
        pub username: String,
        #[prost(string, tag = "2")]
        pub password: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct PullImageRequest {
        #[prost(message, optional, tag = "1")]
        pub image: Option<ImageSpec>,
        #[prost(message, optional, tag = "2")]
        pub auth: Option<AuthConfig>,
        #[prost(message, optional, tag = "3")]
        pub sandbox_config: Option<PodSandboxConfig>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ListImagesResponse {
        #[prost(message, repeated, tag = "1")]
        pub images: Vec<ListedImage>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ListedImage {
        #[prost(string, repeated, tag = "2")]
        pub tags: Vec<String>,
        #[prost(uint64, tag = "4")]
        pub size: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ImageStatusResponse {
        #[prost(message, optional, tag = "1")]
        pub image: Option<ListedImage>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ImageFsInfoResponse {
        #[prost(message, repeated, tag = "1")]
        pub image_filesystems: Vec<Empty>,
    }

    /// The request of RemoveImage and ImageStatus, and of PullImage without credentials and sandbox.
    #[derive(Clone, PartialEq, Message)]
    pub struct ImageRequest {
        #[prost(message, optional, tag = "1")]
        pub image: Option<ImageSpec>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ContainerMetadata {
        #[prost(string, tag = "1")]
        pub name: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct LinuxContainerSecurityContext {
        #[prost(message, optional, tag = "3")]
        pub namespace_options: Option<NamespaceOption>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct LinuxContainerConfig {
        #[prost(message, optional, tag = "2")]
        pub security_context: Option<LinuxContainerSecurityContext>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ContainerConfig {
        #[prost(message, optional, tag = "1")]
        pub metadata: Option<ContainerMetadata>,
        #[prost(message, optional, tag = "2")]
        pub image: Option<ImageSpec>,
        #[prost(string, repeated, tag = "3")]
        pub command: Vec<String>,
        #[prost(string, tag = "11")]
        pub log_path: String,
        #[prost(message, optional, tag = "15")]
        pub linux: Option<LinuxContainerConfig>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct CreateContainerRequest {
        #[prost(string, tag = "1")]
        pub pod_sandbox_id: String,
        #[prost(message, optional, tag = "2")]
        pub config: Option<ContainerConfig>,
        #[prost(message, optional, tag = "3")]
        pub sandbox_config: Option<PodSandboxConfig>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ExecSyncRequest {
        #[prost(string, tag = "1")]
        pub container_id: String,
        #[prost(string, repeated, tag = "2")]
        pub cmd: Vec<String>,
        #[prost(int64, tag = "3")]
        pub timeout: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ExecSyncResponse {
        #[prost(bytes = "vec", tag = "1")]
        pub stdout: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub stderr: Vec<u8>,
        #[prost(int32, tag = "3")]
        pub exit_code: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct StopContainerRequest {
        #[prost(string, tag = "1")]
        pub container_id: String,
        #[prost(int64, tag = "2")]
        pub timeout: i64,
    }

    const NODE: i32 = 2;

    /// Pulls an image as the kubelet does.
    pub fn pull(client: &Client, reference: &str) -> Result<String, tonic::Status> {
        client.call::<_, Id>("/runtime.v1.ImageService/PullImage", image(reference)).map(|i| i.id)
    }

    /// Pulls an image as the kubelet does for a pod with a pull secret.
    pub fn pull_as(client: &Client, reference: &str, user: &str, password: &str) -> Result<String, tonic::Status> {
        let metadata = PodSandboxMetadata { name: "pod".into(), uid: "1".into(), namespace: "team".into() };
        let request = PullImageRequest {
            image: Some(ImageSpec { image: reference.into() }),
            auth: Some(AuthConfig { username: user.into(), password: password.into() }),
            sandbox_config: Some(PodSandboxConfig { metadata: Some(metadata), ..Default::default() }),
        };
        client.call::<_, Id>("/runtime.v1.ImageService/PullImage", request).map(|i| i.id)
    }

    /// References of all images.
    pub fn images(client: &Client) -> Result<Vec<String>, tonic::Status> {
        let listed = client.call::<_, ListImagesResponse>("/runtime.v1.ImageService/ListImages", Empty {})?;
        Ok(listed.images.into_iter().flat_map(|image| image.tags).collect())
    }

    /// The tags of an image, if it is there.
    pub fn image_status(client: &Client, reference: &str) -> Result<Option<Vec<String>>, tonic::Status> {
        let status = client.call::<_, ImageStatusResponse>("/runtime.v1.ImageService/ImageStatus", image(reference))?;
        Ok(status.image.map(|image| image.tags))
    }

    /// How many filesystems hold images.
    pub fn filesystems(client: &Client) -> Result<usize, tonic::Status> {
        let info = client.call::<_, ImageFsInfoResponse>("/runtime.v1.ImageService/ImageFsInfo", Empty {})?;
        Ok(info.image_filesystems.len())
    }

    /// A call that image services do not have.
    pub fn nonsense(client: &Client) -> Result<(), tonic::Status> {
        client.call::<_, Empty>("/runtime.v1.ImageService/Nonsense", Empty {}).map(|_| ())
    }

    /// The kubelet's way of asking whether the image service is there.
    pub fn list_images(client: &Client) -> Result<(), tonic::Status> {
        client.call::<_, Empty>("/runtime.v1.ImageService/ListImages", Empty {}).map(|_| ())
    }

    pub fn remove_image(client: &Client, reference: &str) -> Result<(), tonic::Status> {
        client.call::<_, Empty>("/runtime.v1.ImageService/RemoveImage", image(reference)).map(|_| ())
    }

    fn image(reference: &str) -> ImageRequest {
        ImageRequest { image: Some(ImageSpec { image: reference.into() }) }
    }

    /// A pod on the host's network with one container, which is running. Removed when dropped.
    pub struct Pod {
        client: Client,
        pub sandbox: String,
        pub container: String,
    }

    impl Pod {
        pub fn run(
            client: &Client,
            name: &str,
            reference: &str,
            command: &[&str],
            logs: &Path,
        ) -> Result<Pod, tonic::Status> {
            let host = || Some(NamespaceOption { network: NODE });
            let config = PodSandboxConfig {
                metadata: Some(PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "lab".into() }),
                log_directory: logs.display().to_string(),
                linux: Some(LinuxPodSandboxConfig {
                    security_context: Some(LinuxSandboxSecurityContext { namespace_options: host() }),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let request = RunPodSandboxRequest { config: Some(config.clone()) };
            let sandbox = client.call::<_, Id>("/runtime.v1.RuntimeService/RunPodSandbox", request)?.id;
            let mut pod = Pod { client: client.clone(), sandbox: sandbox.clone(), container: String::new() };
            let request = CreateContainerRequest {
                pod_sandbox_id: sandbox,
                config: Some(ContainerConfig {
                    metadata: Some(ContainerMetadata { name: "main".into() }),
                    image: Some(ImageSpec { image: reference.into() }),
                    command: command.iter().map(|c| c.to_string()).collect(),
                    log_path: format!("{name}.log"),
                    linux: Some(LinuxContainerConfig {
                        security_context: Some(LinuxContainerSecurityContext { namespace_options: host() }),
                    }),
                }),
                sandbox_config: Some(config),
            };
            pod.container = client.call::<_, Id>("/runtime.v1.RuntimeService/CreateContainer", request)?.id;
            client.call::<_, Empty>("/runtime.v1.RuntimeService/StartContainer", Id { id: pod.container.clone() })?;
            Ok(pod)
        }

        /// Runs a command in the container; exit code, standard output, standard error.
        pub fn exec(&self, command: &[&str]) -> Result<(i32, Vec<u8>, Vec<u8>), tonic::Status> {
            let cmd = command.iter().map(|c| c.to_string()).collect();
            let request = ExecSyncRequest { container_id: self.container.clone(), cmd, timeout: 300 };
            let done: ExecSyncResponse = self.client.call("/runtime.v1.RuntimeService/ExecSync", request)?;
            Ok((done.exit_code, done.stdout, done.stderr))
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            let stop = StopContainerRequest { container_id: self.container.clone(), timeout: 0 };
            let _ = self.client.call::<_, Empty>("/runtime.v1.RuntimeService/StopContainer", stop);
            for method in ["/runtime.v1.RuntimeService/StopPodSandbox", "/runtime.v1.RuntimeService/RemovePodSandbox"] {
                let _ = self.client.call::<_, Empty>(method, Id { id: self.sandbox.clone() });
            }
        }
    }
}
