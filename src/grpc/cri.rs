//! CRI's image service, passed on to containerd, for the logins that kubelet sends with it.
//!
//! kubelet is told to ask here (`--image-service-endpoint`). Five calls are passed on byte for byte, so that no field is lost that a
//! newer kubelet or containerd knows; of `PullImage` and `RemoveImage` the few fields that matter are read on the way. Nothing is
//! answered from here.

use super::proto::cri::{PullImageRequest, RemoveImageRequest};
use crate::keychain::{CriAuth, CriLogins};
use bytes::{Buf, BufMut, Bytes};
use futures::future::BoxFuture;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use std::{
    convert::Infallible,
    io,
    path::PathBuf,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::net::UnixStream;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{NamedService, UnaryService},
    transport::{Channel, Endpoint},
};

/// What is passed on; kubelet asks an image service for nothing else.
const METHODS: [&str; 5] = ["ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo"];
/// One message, in both directions: kubelet's and containerd's own limit.
const MAX_MESSAGE: usize = 16 << 20;
/// To connect. The calls themselves take as long as kubelet lets them.
const CONNECT: Duration = Duration::from_secs(3);

/// The service.
#[derive(Clone)]
pub struct CriImages {
    logins: Arc<CriLogins>,
    channel: Channel,
    path: Arc<PathBuf>,
}

impl CriImages {
    /// Passes on to the image service at the socket `path`, which need not exist yet, and tells `logins`. Call within a tokio runtime.
    pub fn new(path: impl Into<PathBuf>, logins: Arc<CriLogins>) -> CriImages {
        let path = Arc::new(path.into());
        let socket = path.clone();
        // The connector below decides where to go; the address only fills the authority header.
        let endpoint = Endpoint::from_static("http://cri.local").connect_timeout(CONNECT);
        let connector = tower::service_fn(move |_: http::Uri| {
            let socket = socket.clone();
            async move { io::Result::Ok(TokioIo::new(UnixStream::connect(&*socket).await?)) }
        });
        CriImages { logins, channel: endpoint.connect_with_connector_lazy(connector), path }
    }

    /// Takes note of what passes by. What cannot be read is containerd's to refuse.
    fn note(&self, method: &str, message: &Bytes) {
        match method {
            "PullImage" => {
                let Ok(PullImageRequest { image: Some(image), auth }) = PullImageRequest::decode(message.clone())
                else {
                    return;
                };
                let Some(auth) = auth else { return };
                let auth = CriAuth {
                    username: auth.username,
                    password: auth.password,
                    auth: auth.auth,
                    server_address: auth.server_address,
                    identity_token: auth.identity_token,
                    registry_token: auth.registry_token,
                };
                self.logins.remember(&image.image, auth);
            }
            "RemoveImage" => {
                if let Ok(RemoveImageRequest { image: Some(image) }) = RemoveImageRequest::decode(message.clone()) {
                    self.logins.forget(&image.image);
                }
            }
            _ => {}
        }
    }

    async fn pass_on(&self, method: &'static str, request: Request<Bytes>) -> Result<Response<Bytes>, Status> {
        self.note(method, request.get_ref());
        let absent = |error: &dyn std::fmt::Display| {
            Status::unavailable(format!(
                "soci-snapshotter cannot reach the CRI image service at {} (cri_keychain.image_service_path): {error}",
                self.path.display()
            ))
        };
        let mut client = tonic::client::Grpc::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        client.ready().await.map_err(|error| absent(&error))?;
        let path = PathAndQuery::try_from(format!("/{}/{method}", Self::NAME))
            .map_err(|_| Status::internal("the name of a method is not a path"))?;
        client.unary(request, path, Raw).await.map_err(|status| match status.code() {
            // containerd's own has no source: this one is about the connection.
            Code::Unavailable if std::error::Error::source(&status).is_some() => absent(&status.message()),
            _ => status,
        })
    }
}

impl NamedService for CriImages {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl tower::Service<http::Request<Body>> for CriImages {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let asked = request.uri().path().rsplit('/').next().unwrap_or_default();
        let Some(method) = METHODS.into_iter().find(|method| *method == asked) else {
            let text = format!("{} has no {asked}", Self::NAME);
            return Box::pin(async move { Ok(Status::unimplemented(text).into_http()) });
        };
        let call = Call { service: self.clone(), method };
        Box::pin(async move {
            let mut server = tonic::server::Grpc::new(Raw)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE);
            Ok(server.unary(call, request).await)
        })
    }
}

struct Call {
    service: CriImages,
    method: &'static str,
}

impl UnaryService<Bytes> for Call {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let (service, method) = (self.service.clone(), self.method);
        Box::pin(async move { service.pass_on(method, request).await })
    }
}

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }
    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}
