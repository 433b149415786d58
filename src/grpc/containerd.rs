//! A client of containerd: image records, content and leases of one namespace, for the `soci` tool.
//!
//! Unlike [`super::content`], which serves the daemon and gives up quickly, this one waits: somebody asked for the result. Every call
//! is made in the namespace of the client, and, once there is a [`Lease`], under it: what is written then stays until the lease is
//! given back, and after that only if something refers to it.
//!
//! Nothing that is read here is verified: whoever reads knows the digest.

use super::labels::NAMESPACE;
use super::proto::content::content_client::ContentClient;
use super::proto::images::images_client::ImagesClient;
use super::proto::leases::leases_client::LeasesClient;
use super::proto::{content, images, leases, types};
use crate::oci::{Descriptor, Digest};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::metadata::{AsciiMetadataValue, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

/// gRPC metadata that names the lease a call is made under.
const LEASE: &str = "containerd-lease";
/// Label after whose time containerd forgets a lease: what is left of a tool that was killed goes away by itself.
const EXPIRE: &str = "containerd.io/gc.expire";
/// How long a lease lives that nobody gives back. containerd's own tools take a day, too.
const LEASE_TIME: Duration = Duration::from_secs(24 * 3600);
/// One message of a read. containerd sends 1 MiB or less.
const MAX_MESSAGE: usize = 16 << 20;
/// One message of a write: well below the 4 MiB that containerd 1.x takes.
const WRITE: usize = 1 << 20;
/// HTTP/2's own 64 KiB would have containerd wait for us sixteen times for each of its messages.
const WINDOW: u32 = 4 << 20;
/// A writer of the same blob that has not finished after this long never will.
const BUSY: Duration = Duration::from_secs(30);

/// Why containerd did not do what it was asked to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContainerdError {
    #[error(
        "cannot reach containerd at {}: {what} (is it running? --address or CONTAINERD_ADDRESS name its socket)",
        address.display()
    )]
    Unreachable { address: PathBuf, what: String },
    #[error("containerd cannot {doing}: {what}")]
    Refused { doing: String, what: String },
    #[error("containerd's namespace {0:?} is not a name that can be sent")]
    Namespace(String),
    #[error("containerd's record of image {name:?} is not usable: {why}")]
    Image { name: String, why: &'static str },
    #[error("containerd sent {got} bytes of blob {digest} where {wanted} were asked for")]
    WrongLength { digest: Digest, wanted: u64, got: u64 },
}

/// An image record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub name: String,
    pub target: Descriptor,
    pub labels: BTreeMap<String, String>,
}

/// What containerd knows about a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub digest: Digest,
    pub size: u64,
    pub labels: BTreeMap<String, String>,
}

/// containerd, one namespace of it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    address: PathBuf,
    namespace: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
}

impl Containerd {
    /// Connects. `address` may begin with `unix://`.
    pub async fn connect(address: &str, namespace: &str, patience: Duration) -> Result<Containerd, ContainerdError> {
        let address = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
        let bad = || ContainerdError::Namespace(namespace.chars().take(100).collect());
        let namespace = AsciiMetadataValue::try_from(namespace).map_err(|_| bad())?;
        let path = address.clone();
        // The connector decides where to go; the address only fills the authority header.
        let endpoint = Endpoint::from_static("http://containerd.local")
            .connect_timeout(patience)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(2 * WINDOW);
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move { io::Result::Ok(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel
            .map_err(|error| ContainerdError::Unreachable { address: address.clone(), what: innermost(&error) })?;
        Ok(Containerd { channel, address, namespace, lease: None })
    }

    /// The same, under a lease: see there.
    pub fn under(&self, lease: &Lease) -> Containerd {
        Containerd { lease: Some(lease.id.clone()), ..self.clone() }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert(NAMESPACE, self.namespace.clone());
        if let Some(lease) = &self.lease {
            metadata.insert(LEASE, lease.clone());
        }
        request
    }

    fn refused(&self, doing: impl Into<String>, status: &Status) -> ContainerdError {
        if status.code() == Code::Unavailable {
            let what = status.message().to_owned();
            return ContainerdError::Unreachable { address: self.address.clone(), what };
        }
        ContainerdError::Refused { doing: doing.into(), what: status.message().to_owned() }
    }

    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The record of that exact name.
    pub async fn image(&self, name: &str) -> Result<Option<Image>, ContainerdError> {
        let request = self.request(images::GetImageRequest { name: name.to_owned() });
        match self.images().get(request).await {
            Ok(response) => response.into_inner().image.map(image).transpose(),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.refused(format!("look up image {name:?}"), &status)),
        }
    }

    /// All records. One that we cannot understand (another digest algorithm) is left out.
    pub async fn all_images(&self) -> Result<Vec<Image>, ContainerdError> {
        let request = self.request(images::ListImagesRequest { filters: Vec::new() });
        let response = self.images().list(request).await.map_err(|s| self.refused("list images", &s))?;
        Ok(response.into_inner().images.into_iter().filter_map(|i| image(i).ok()).collect())
    }

    /// Makes `name` name `target`. A record that exists keeps its labels.
    pub async fn set_image(&self, name: &str, target: &Descriptor) -> Result<(), ContainerdError> {
        let record = images::Image { name: name.to_owned(), target: Some(wire(target)), ..Default::default() };
        let create = self.request(images::CreateImageRequest { image: Some(record.clone()) });
        match self.images().create(create).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(self.refused(format!("record image {name:?}"), &status)),
        }
        let mask = prost_types::FieldMask { paths: vec!["target".into()] };
        let update = self.request(images::UpdateImageRequest { image: Some(record), update_mask: Some(mask) });
        let updated = self.images().update(update).await;
        updated.map(drop).map_err(|s| self.refused(format!("update the record of image {name:?}"), &s))
    }

    /// Sets labels of an image record; an empty value removes one. Other labels stay.
    ///
    /// The target goes along although it is not to be changed: containerd 2.2 crashes on a record without one.
    pub async fn label_image(&self, image: &Image, labels: &BTreeMap<String, String>) -> Result<(), ContainerdError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let name = &image.name;
        let target = Some(wire(&image.target));
        let record = images::Image { name: name.clone(), labels: labels.clone(), target, ..Default::default() };
        let mask = prost_types::FieldMask { paths };
        let update = self.request(images::UpdateImageRequest { image: Some(record), update_mask: Some(mask) });
        let updated = self.images().update(update).await;
        updated.map(drop).map_err(|s| self.refused(format!("label image {name:?}"), &s))
    }

    /// What is known about a blob, if it is there.
    pub async fn info(&self, digest: Digest) -> Result<Option<Info>, ContainerdError> {
        let request = self.request(content::InfoRequest { digest: digest.to_string() });
        match self.content().info(request).await {
            Ok(response) => Ok(response.into_inner().info.and_then(info)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.refused(format!("look up blob {digest}"), &status)),
        }
    }

    /// All blobs of the namespace.
    pub async fn all_content(&self) -> Result<Vec<Info>, ContainerdError> {
        let failed = |s: Status| self.refused("list its content", &s);
        let request = self.request(content::ListContentRequest { filters: Vec::new() });
        let mut stream = self.content().list(request).await.map_err(failed)?.into_inner();
        let mut all = Vec::new();
        while let Some(part) = stream.message().await.map_err(failed)? {
            all.extend(part.info.into_iter().filter_map(info));
        }
        Ok(all)
    }

    /// The `size` bytes of a blob, arriving.
    pub async fn read(&self, digest: Digest, size: u64) -> Result<Option<Reader>, ContainerdError> {
        let request = self.request(content::ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 });
        match self.content().read(request).await {
            Ok(response) => {
                Ok(Some(Reader { containerd: self.clone(), stream: response.into_inner(), digest, size, got: 0 }))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.refused(format!("read blob {digest}"), &status)),
        }
    }

    /// The bytes `range` of a blob, if it is there; as many as containerd gives.
    pub async fn read_range(
        &self,
        digest: Digest,
        range: std::ops::Range<u64>,
    ) -> Result<Option<Vec<u8>>, ContainerdError> {
        let size = range.end.saturating_sub(range.start);
        if size == 0 {
            // The wire's zero means "to the end".
            return Ok(Some(Vec::new()));
        }
        let wrong = || ContainerdError::WrongLength { digest, wanted: size, got: 0 };
        let (Ok(offset), Ok(size)) = (i64::try_from(range.start), i64::try_from(size)) else { return Err(wrong()) };
        let request = self.request(content::ReadContentRequest { digest: digest.to_string(), offset, size });
        let failed = |s: Status| self.refused(format!("read blob {digest}"), &s);
        let mut stream = match self.content().read(request).await {
            Ok(response) => response.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(failed(status)),
        };
        let mut bytes = Vec::new();
        while let Some(part) = stream.message().await.map_err(failed)? {
            bytes.extend_from_slice(&part.data);
            if bytes.len() as u64 > range.end - range.start {
                return Err(wrong());
            }
        }
        Ok(Some(bytes))
    }

    /// Keeps a blob, with labels that say what it refers to. One that is there already gets the labels.
    pub async fn write(
        &self,
        digest: Digest,
        bytes: Bytes,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let deadline = tokio::time::Instant::now() + BUSY;
        loop {
            match self.try_write(digest, bytes.clone(), labels).await {
                Ok(()) => return Ok(()),
                Err(status) if status.code() == Code::AlreadyExists => return self.label(digest, labels).await,
                // Somebody else writes the same blob just now.
                Err(status) if status.code() == Code::Unavailable && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(status) => {
                    let abort = self.request(content::AbortRequest { r#ref: reference(digest) });
                    // What is left of the attempt is in the way of the next one; containerd removes it within a day by itself.
                    let _ = self.content().abort(abort).await;
                    return Err(self.refused(format!("write blob {digest}"), &status));
                }
            }
        }
    }

    async fn try_write(&self, digest: Digest, bytes: Bytes, labels: &BTreeMap<String, String>) -> Result<(), Status> {
        let total = i64::try_from(bytes.len()).map_err(|_| Status::out_of_range("the blob is too large"))?;
        let base = content::WriteContentRequest {
            r#ref: reference(digest),
            total,
            expected: digest.to_string(),
            ..Default::default()
        };
        let mut messages =
            vec![content::WriteContentRequest { action: content::WriteAction::Stat.into(), ..base.clone() }];
        for at in (0..bytes.len()).step_by(WRITE) {
            messages.push(content::WriteContentRequest {
                action: content::WriteAction::Write.into(),
                offset: at as i64,
                data: bytes.slice(at..bytes.len().min(at + WRITE)),
                ..base.clone()
            });
        }
        messages.push(content::WriteContentRequest {
            action: content::WriteAction::Commit.into(),
            offset: total,
            labels: labels.clone(),
            ..base
        });
        let mut answers = self.content().write(self.request(futures::stream::iter(messages))).await?.into_inner();
        let mut committed = false;
        while let Some(answer) = answers.message().await? {
            committed = answer.action() == content::WriteAction::Commit;
        }
        if committed { Ok(()) } else { Err(Status::aborted("it ended the exchange before the blob was complete")) }
    }

    /// Sets labels of a blob; an empty value removes one. Other labels stay.
    pub async fn label(&self, digest: Digest, labels: &BTreeMap<String, String>) -> Result<(), ContainerdError> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = content::Info { digest: digest.to_string(), labels: labels.clone(), ..Default::default() };
        let mask = prost_types::FieldMask { paths };
        let update = self.request(content::UpdateRequest { info: Some(info), update_mask: Some(mask) });
        self.content().update(update).await.map(drop).map_err(|s| self.refused(format!("label blob {digest}"), &s))
    }

    /// Removes a blob from the namespace; false if it was not there.
    pub async fn delete(&self, digest: Digest) -> Result<bool, ContainerdError> {
        let request = self.request(content::DeleteContentRequest { digest: digest.to_string() });
        match self.content().delete(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(self.refused(format!("delete blob {digest}"), &status)),
        }
    }

    /// Takes out a lease. Give it back with [`Lease::give_back`]; containerd does so after a day.
    pub async fn lease(&self) -> Result<Lease, ContainerdError> {
        let now = jiff::Timestamp::now();
        let id = format!("soci-{}-{}", std::process::id(), now.as_nanosecond());
        let expires = now.saturating_add(LEASE_TIME).unwrap_or(now).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let request = leases::CreateRequest { id: id.clone(), labels: BTreeMap::from([(EXPIRE.into(), expires)]) };
        let created = LeasesClient::new(self.channel.clone()).create(self.request(request)).await;
        created.map_err(|s| self.refused("take out a lease", &s))?;
        let id = MetadataValue::try_from(id.as_str()).map_err(|_| ContainerdError::Namespace(id.clone()))?;
        Ok(Lease { containerd: self.clone(), id })
    }

    /// Where it listens.
    pub fn address(&self) -> &Path {
        &self.address
    }
}

/// See [`Containerd::lease`].
#[derive(Debug)]
pub struct Lease {
    containerd: Containerd,
    id: AsciiMetadataValue,
}

impl Lease {
    /// Gives it back; what nothing else refers to goes away with the next collection.
    pub async fn give_back(self) -> Result<(), ContainerdError> {
        let id = self.id.to_str().unwrap_or_default().to_owned();
        let request = self.containerd.request(leases::DeleteRequest { id, sync: false });
        match LeasesClient::new(self.containerd.channel.clone()).delete(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(self.containerd.refused("take back a lease", &status)),
        }
    }
}

/// A blob, arriving.
#[derive(Debug)]
pub struct Reader {
    containerd: Containerd,
    stream: Streaming<content::ReadContentResponse>,
    digest: Digest,
    size: u64,
    got: u64,
}

impl Reader {
    /// The next bytes; none at the end, when all came that were announced.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ContainerdError> {
        let refused = |s: Status| self.containerd.refused(format!("read blob {}", self.digest), &s);
        let wrong = |got| ContainerdError::WrongLength { digest: self.digest, wanted: self.size, got };
        match self.stream.message().await.map_err(refused)? {
            Some(part) => {
                self.got += part.data.len() as u64;
                if self.got > self.size { Err(wrong(self.got)) } else { Ok(Some(part.data)) }
            }
            None if self.got == self.size => Ok(None),
            None => Err(wrong(self.got)),
        }
    }
}

/// What containerd calls a blob that is being written: as the Go tools, so that two of them do not write it twice.
fn reference(digest: Digest) -> String {
    digest.to_string()
}

fn image(record: images::Image) -> Result<Image, ContainerdError> {
    let bad = |why| ContainerdError::Image { name: record.name.chars().take(300).collect(), why };
    let target = record.target.as_ref().ok_or_else(|| bad("it names no content"))?;
    let digest = target.digest.parse().map_err(|_| bad("its digest is not a sha256 digest"))?;
    let size = u64::try_from(target.size).map_err(|_| bad("its size is negative"))?;
    let mut descriptor = Descriptor::new(&target.media_type, digest, size);
    descriptor.annotations = target.annotations.clone();
    Ok(Image { name: record.name, target: descriptor, labels: record.labels })
}

fn wire(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone(),
    }
}

fn info(info: content::Info) -> Option<Info> {
    Some(Info { digest: info.digest.parse().ok()?, size: u64::try_from(info.size).ok()?, labels: info.labels })
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
