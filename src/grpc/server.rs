//! A listener, bounded: connections, streams, headers, messages, and requests being worked on.

use super::cri::CriImages;
use super::proto::snapshots::snapshots_server::SnapshotsServer;
use super::service::Service;
use crate::snapshot::Door;
use futures::{StreamExt, future::BoxFuture};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// What a peer can make us hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// containerd, `ctr` and kubelet hold one connection each.
    pub connections: usize,
    /// Streams of one connection. containerd prepares all layers of an image at the same time, for several images.
    pub streams: u32,
    /// Requests being worked on, all connections together.
    pub requests: usize,
    /// One request: gRPC's own default, which the Go daemon has.
    pub message_bytes: usize,
    /// All headers of one request. Ours are a namespace and a trace id.
    pub header_bytes: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 64, streams: 256, requests: 256, message_bytes: 4 << 20, header_bytes: 32 << 10 }
    }
}

/// Serves the Snapshots service on `listener` until `shutdown`, and CRI's image service if there is one; then finishes what has begun.
pub async fn serve(
    listener: UnixListener,
    door: impl Into<Door>,
    images: Option<CriImages>,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let service = SnapshotsServer::new(Service::new(door.into(), limits.requests));
    let service = service.max_decoding_message_size(limits.message_bytes);
    Server::builder()
        .max_concurrent_streams(limits.streams)
        .concurrency_limit_per_connection(limits.requests)
        .http2_max_header_list_size(limits.header_bytes)
        .serve_with_incoming_shutdown(
            Services { snapshots: service, images },
            connections(listener, limits.connections),
            shutdown,
        )
        .await
}

/// What is behind one socket.
#[derive(Clone)]
struct Services {
    snapshots: SnapshotsServer<Service>,
    images: Option<CriImages>,
}

impl tower::Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = request.uri().path().trim_start_matches('/').split('/').next();
        match &mut self.images {
            Some(images) if service == Some(CriImages::NAME) => images.call(request),
            // Of a service that is not here it says so itself: no such method.
            _ => self.snapshots.call(request),
        }
    }
}

/// Accepts while there are fewer than `most` connections; others wait in the listener's own queue.
fn connections(listener: UnixListener, most: usize) -> impl futures::Stream<Item = io::Result<Connection>> {
    let slots = Arc::new(Semaphore::new(most));
    futures::stream::unfold((listener, slots), async |(listener, slots)| {
        // The semaphore is never closed.
        let slot = slots.clone().acquire_owned().await.ok()?;
        let accepted = listener.accept().await;
        if accepted.is_err() {
            // No descriptors left, usually: trying again at once would only burn the processor.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let connection = accepted.map(|(stream, _)| Connection { stream, _slot: slot });
        Some((connection, (listener, slots)))
    })
    .filter_map(async |accepted| accepted.inspect_err(|error| tracing::warn!(%error, "cannot accept")).ok().map(Ok))
}

/// A connection that counts as long as it lives.
struct Connection {
    stream: UnixStream,
    _slot: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> UdsConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
