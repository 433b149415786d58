//! The Snapshots service: messages to and from a [`Snapshotter`], as far as its [`Door`] is open.

use super::filter::Filters;
use super::labels;
use super::proto::snapshots::snapshots_server::Snapshots;
use super::proto::snapshots::{self as wire};
use super::proto::types;
use super::status::status;
use crate::snapshot::{Door, Info, Kind, Mount, SnapshotError, Snapshotter, Timestamp};
use futures::stream::BoxStream;
use std::sync::Arc;
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Request, Response, Status};

/// Snapshots in one message of List, as containerd sends and expects them.
const PAGE: usize = 100;

/// Implements the generated trait. The `snapshotter` field of requests is ignored: there is only one here.
#[derive(Clone)]
pub struct Service {
    door: Door,
    /// Requests being worked on; more wait.
    slots: Arc<Semaphore>,
}

impl Service {
    /// At most `concurrency` requests are worked on at the same time.
    pub fn new(door: Door, concurrency: usize) -> Service {
        Service { door, slots: Arc::new(Semaphore::new(concurrency)) }
    }

    /// What makes snapshots goes through here.
    fn admit(&self) -> Result<Snapshotter, Status> {
        self.door.admit().map_err(|error| status(&error))
    }

    fn enter(&self) -> Result<Snapshotter, Status> {
        self.door.enter().map_err(|error| status(&error))
    }

    async fn slot(&self) -> Result<SemaphorePermit<'_>, Status> {
        self.slots.acquire().await.map_err(|_| Status::unavailable("shutting down"))
    }
}

/// The result of an operation as a response.
fn answer<T, M>(result: Result<T, SnapshotError>, message: impl FnOnce(T) -> M) -> Result<Response<M>, Status> {
    result.map(|value| Response::new(message(value))).map_err(|error| status(&error))
}

fn parent(name: String) -> Option<String> {
    (!name.is_empty()).then_some(name)
}

fn mount(mount: Mount) -> types::Mount {
    let Mount { kind, source, options } = mount;
    types::Mount { r#type: kind.name().into(), source, target: String::new(), options }
}

fn timestamp(time: Timestamp) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds: time.seconds, nanos: i32::try_from(time.nanos).unwrap_or(0) })
}

fn info(info: Info) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: timestamp(info.created),
        updated_at: timestamp(info.updated),
        labels: info.labels,
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let _slot = self.slot().await?;
        let (metadata, _, message) = request.into_parts();
        let wire::PrepareSnapshotRequest { snapshotter: _, key, parent: name, labels } = message;
        tracing::debug!(key, parent = name, "prepare");
        let namespace = labels::namespace(&metadata).or_else(|| labels::namespace_of_key(&key));
        let parent = parent(name);
        let extraction = labels::extraction(&labels, parent.as_deref(), namespace).map_err(|error| status(&error))?;
        let prepared = self.admit()?.prepare(key, parent, labels, extraction).await;
        answer(prepared, |m| wire::PrepareSnapshotResponse { mounts: vec![mount(m)] })
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let _slot = self.slot().await?;
        let wire::ViewSnapshotRequest { snapshotter: _, key, parent: name, labels } = request.into_inner();
        let viewed = self.admit()?.view(key, parent(name), labels).await;
        answer(viewed, |m| wire::ViewSnapshotResponse { mounts: vec![mount(m)] })
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Result<Response<wire::MountsResponse>, Status> {
        let _slot = self.slot().await?;
        let mounts = self.enter()?.mounts(&request.into_inner().key).await;
        answer(mounts, |m| wire::MountsResponse { mounts: vec![mount(m)] })
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let _slot = self.slot().await?;
        let wire::CommitSnapshotRequest { snapshotter: _, name, key, labels } = request.into_inner();
        answer(self.enter()?.commit(name, key, labels).await, |()| ())
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let _slot = self.slot().await?;
        answer(self.enter()?.remove(request.into_inner().key).await, |()| ())
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let _slot = self.slot().await?;
        let stat = self.enter()?.stat(&request.into_inner().key);
        answer(stat, |i| wire::StatSnapshotResponse { info: Some(info(i)) })
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let _slot = self.slot().await?;
        let wire::UpdateSnapshotRequest { snapshotter: _, info: given, update_mask } = request.into_inner();
        let wire::Info { name, labels, .. } = given.ok_or_else(|| Status::invalid_argument("info is missing"))?;
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let updated = self.enter()?.update(name, labels, &fields).await;
        answer(updated, |i| wire::UpdateSnapshotResponse { info: Some(info(i)) })
    }

    type ListStream = BoxStream<'static, Result<wire::ListSnapshotsResponse, Status>>;

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = Arc::new(Filters::parse(&request.into_inner().filters)?);
        // Page by page, so that a slow reader holds one page and no transaction.
        let start = Some((self.clone(), filters, None::<String>));
        let pages = futures::stream::try_unfold(start, async |state| {
            let Some((service, filters, after)) = state else { return Ok(None) };
            let page = {
                let _slot = service.slot().await?;
                let wanted = filters.clone();
                let snapshotter = service.enter()?;
                let page = snapshotter.page(after, PAGE, move |info| wanted.matches(info));
                page.await.map_err(|error| status(&error))?
            };
            let next = match page.last() {
                None => return Ok(None),
                Some(last) if page.len() == PAGE => Some((service, filters, Some(last.name.clone()))),
                Some(_) => None,
            };
            let message = wire::ListSnapshotsResponse { info: page.into_iter().map(info).collect() };
            Ok(Some((message, next)))
        });
        Ok(Response::new(Box::pin(pages)))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Result<Response<wire::UsageResponse>, Status> {
        let _slot = self.slot().await?;
        let usage = self.enter()?.usage(&request.into_inner().key).await;
        answer(usage, |u| wire::UsageResponse { size: signed(u.size), inodes: signed(u.inodes) })
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        let _slot = self.slot().await?;
        answer(self.enter()?.cleanup().await, |()| ())
    }
}
