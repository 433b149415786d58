//! One request, and what it takes until the registry believes who asks: each login is tried once, and what was tried is in the error.

use super::{
    auth::{Auth, Door, Trial, Visitor},
    challenge::Challenge,
    client::Site,
    endpoint::{Endpoint, Need},
    error::{Failure, Request},
    transport::Reply,
};
use http::HeaderValue;
use std::sync::Arc;

/// Send with what is [shown](Proving::shown), have the answer [judged](Proving::judge), and do so again until that gives a reply.
pub(super) struct Proving<'a> {
    auth: &'a Auth,
    door: Arc<Door>,
    visitor: Visitor<'a>,
    trial: Trial,
    proof: Option<HeaderValue>,
}

impl<'a> Proving<'a> {
    /// Of what is needed from `site` at `endpoint`; `also` is another repository there that the request reads.
    pub async fn begin(
        site: &'a Site,
        endpoint: &'a Endpoint,
        need: Need,
        also: Option<&'a str>,
        request: &'a Request,
    ) -> Proving<'a> {
        let settings = &site.client.settings;
        let auth = &site.client.auth;
        let door = auth.door(endpoint, &site.name, need, also);
        let visitor = Visitor {
            transport: &site.client.transport,
            endpoint,
            reference: &site.reference,
            request,
            timeout: endpoint.request_timeout(settings.request_timeout),
            idle: settings.idle_timeout,
            need,
            also,
        };
        let proof = auth.present(&door, &visitor).await;
        Proving { auth, door, visitor, trial: Trial::default(), proof }
    }

    /// What to send along.
    pub fn shown(&self) -> Option<&HeaderValue> {
        self.proof.as_ref()
    }

    /// The reply, if that is what it is; none if it is to be asked once more, with what is shown now. The trial ends: each login is tried once.
    pub async fn judge(&mut self, reply: Reply) -> Result<Option<Reply>, Failure> {
        let Reply::Error(mut error) = reply else { return Ok(Some(reply)) };
        let challenges = match error.status.as_u16() {
            401 => error.challenges.clone(),
            // A login that is not enough, or (ECR) one that has ended: another may do.
            403 if self.proof.is_some() && !error.challenges.is_empty() => error.challenges.clone(),
            403 if error.is_expired_login() => vec![Challenge::Basic],
            403 if self.proof.is_some() => self.door.challenge().into_iter().collect(),
            _ => return Ok(Some(Reply::Error(error))),
        };
        tracing::info!("Received status code: {}. Authorizing...", error.status);
        let shown = self.proof.take();
        self.proof = self.auth.answer(&self.door, &self.visitor, &challenges, shown.as_ref(), &mut self.trial).await?;
        if self.proof.is_some() {
            return Ok(None);
        }
        error.tried = self.trial.words();
        Ok(Some(Reply::Error(error)))
    }
}
