//! Reading layers that containerd already has.

use super::lab::channel;
use futures::stream::BoxStream;
use soci::grpc::content::{ContainerdContent, ContentError};
use soci::grpc::proto::content::content_server::{Content, ContentServer};
use soci::grpc::proto::content::*;
use soci::oci::Digest;
use std::time::{Duration, Instant};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// Holds one blob in the namespace `k8s.io`, and lies about every range that starts at 13. Offsets of what it sends count from the
/// start of the read, as containerd's do; for ranges that start at 999, from the start of the blob.
struct Store(Vec<u8>);

#[tonic::async_trait]
impl Content for Store {
    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let known = request.metadata().get("containerd-namespace").is_some_and(|name| name == "k8s.io");
        let digest = request.into_inner().digest;
        if !known || digest != Digest::of(&self.0).to_string() {
            return Err(Status::not_found("content: not found"));
        }
        let info = Some(Info { digest, size: self.0.len() as i64, ..Default::default() });
        Ok(Response::new(InfoResponse { info }))
    }

    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let ReadContentRequest { offset, size, .. } = request.into_inner();
        let (start, lie) = (offset as usize, i64::from(offset == 13));
        let part = self.0[start..start + size as usize].to_vec();
        let chunks: Vec<_> = part
            .chunks(1000)
            .enumerate()
            .map(|(i, data)| {
                let base = if offset == 999 { offset } else { 0 };
                let offset = base + lie + (i * 1000) as i64;
                Ok(ReadContentResponse { offset, data: data.to_vec().into() })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }

    // The rest is never asked for.
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;

    async fn list(&self, _: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        Err(Status::unimplemented("list"))
    }
    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        Err(Status::unimplemented("update"))
    }
    async fn delete(&self, _: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("delete"))
    }

    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn write(&self, _: Request<Streaming<WriteContentRequest>>) -> Result<Response<Self::WriteStream>, Status> {
        Err(Status::permission_denied("this store is read-only"))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

#[tokio::test]
async fn any_range_of_a_blob_that_containerd_has_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("c.sock");
    let blob: Vec<u8> = (0..10_000u32).map(|i| (i * 7) as u8).collect();
    let listener = UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
    let server = ContentServer::new(Store(blob.clone()));
    let server = tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(server, listener));
    let _ = channel(&socket);
    let content = ContainerdContent::new(&socket);
    let digest = Digest::of(&blob);
    assert_eq!(content.size("k8s.io", &digest).await.unwrap(), Some(10_000));
    assert_eq!(content.size("default", &digest).await.unwrap(), None);
    assert_eq!(content.size("k8s.io", &Digest::of(b"other")).await.unwrap(), None);
    for range in [0..10_000, 5..6, 999..3001, 42..42] {
        let bytes = content.read("k8s.io", &digest, range.clone()).await.unwrap();
        assert_eq!(bytes, &blob[range.start as usize..range.end as usize]);
    }
    let wrong = content.read("k8s.io", &digest, 13..20).await;
    assert!(matches!(wrong, Err(ContentError::WrongRange { .. })), "{wrong:?}");
    server.abort();
}

#[tokio::test]
async fn a_containerd_that_does_not_answer_delays_one_call_a_little_and_the_next_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let digest = Digest::of(b"");
    let silent = dir.path().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    for socket in [silent, dir.path().join("missing.sock")] {
        let content = ContainerdContent::new(&socket);
        let start = Instant::now();
        assert!(content.size("k8s.io", &digest).await.is_err());
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        let start = Instant::now();
        assert!(matches!(content.size("k8s.io", &digest).await, Err(ContentError::Absent)));
        assert!(start.elapsed() < Duration::from_millis(50));
    }
}
