//! Reading what a registry sends: bounded in size and in the time it may pause.
//!
//! Time counts only while somebody waits for the next bytes. A caller that stops asking applies back-pressure to the
//! registry and spends none of the time limit; dropping a body part-way closes its connection.

use super::{
    HostId, RegistryError,
    endpoint::Endpoint,
    error::{Advice, Failure, Request},
    transport::{chain, within},
};
use bytes::{Bytes, BytesMut};
use reqwest::Response;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Space reserved before a body of stated size has proven to be that large.
const RESERVE_MAX: u64 = 1 << 20;

/// The body of an answer.
pub(super) struct Body {
    response: Response,
    request: Request,
    idle: Duration,
    left: Option<Duration>,
    received: u64,
}

impl Body {
    pub fn new(response: Response, request: Request, idle: Duration, left: Option<Duration>) -> Body {
        Body { response, request, idle, left, received: 0 }
    }

    /// The same without a limit on the whole; silence is limited still.
    pub fn unhurried(self) -> Body {
        Body { left: None, ..self }
    }

    pub fn response(&self) -> &Response {
        &self.response
    }

    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The next bytes; none at the end. Cancel-safe.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        let limit = self.left.map_or(self.idle, |left| left.min(self.idle));
        let started = Instant::now();
        let result = within(Some(limit), self.response.chunk()).await;
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(started.elapsed());
        }
        let after = self.received;
        match result {
            Some(Ok(chunk)) => {
                self.received += chunk.as_ref().map_or(0, |c| c.len() as u64);
                Ok(chunk)
            }
            Some(Err(error)) => {
                Err(Failure::later(&self.request, format!("lost after {after} bytes: {}", chain(&error)), None))
            }
            None => Err(Failure::later(&self.request, format!("stalled after {after} bytes"), None)),
        }
    }

    /// All of it, if it is not larger than `max`.
    pub async fn read(mut self, max: u64) -> Result<Bytes, Failure> {
        let too_large =
            |request: &Request| Failure::elsewhere(RegistryError::TooLarge { request: request.clone(), limit: max });
        let stated = self.response.content_length().unwrap_or(0);
        if stated > max {
            return Err(too_large(&self.request));
        }
        let mut out = BytesMut::with_capacity(usize::try_from(stated.min(RESERVE_MAX)).unwrap_or(0));
        while let Some(chunk) = self.chunk().await? {
            if self.received > max {
                return Err(too_large(&self.request));
            }
            out.extend_from_slice(&chunk);
        }
        Ok(out.freeze())
    }
}

/// One range of a blob, arriving.
///
/// Exactly the bytes asked for come out, or an error: the end ([`RangeBody::chunk`] giving `None`) is only reached when
/// all of them did. They are *not* verified; that is the caller's, who knows the digest of the span.
pub struct RangeBody {
    body: Option<Body>,
    remaining: u64,
    /// The registry sends more than was asked for (200 instead of 206): stop at the end of the range.
    excess: Excess,
    endpoint: Arc<Endpoint>,
    total: Option<u64>,
}

/// What follows the range in the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Excess {
    Error,
    CutOff,
}

impl RangeBody {
    pub(super) fn new(
        body: Option<Body>,
        length: u64,
        excess: Excess,
        endpoint: Arc<Endpoint>,
        total: Option<u64>,
    ) -> RangeBody {
        RangeBody { body, remaining: length, excess, endpoint, total }
    }

    /// The host that serves it; for [`super::Repository::blob_range`]'s `avoid` when the bytes turn out to be wrong.
    pub fn host(&self) -> HostId {
        self.endpoint.id.clone()
    }

    /// Size of the whole blob, if the registry said so.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// The next bytes, none at the end of the range. Cancel-safe. After an error there is nothing more.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        match self.next().await {
            Ok(chunk) => Ok(chunk),
            Err(failure) => {
                self.body = None;
                match failure.advice {
                    Advice::Corrupt => self.endpoint.lied(),
                    Advice::Later(_) | Advice::Elsewhere => self.endpoint.failed(None),
                }
                Err(failure.error)
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let Some(body) = &mut self.body else { return Ok(None) };
        if self.remaining == 0 && self.excess == Excess::CutOff {
            self.body = None;
            return Ok(None);
        }
        match body.chunk().await? {
            Some(mut chunk) => {
                let length = chunk.len() as u64;
                if length <= self.remaining {
                    self.remaining -= length;
                    if self.remaining == 0 {
                        // Who asked need not come back for the end.
                        self.endpoint.succeeded();
                    }
                    return Ok(Some(chunk));
                }
                if self.excess == Excess::Error {
                    return Err(Failure::malformed(body.request(), "the body is longer than the range"));
                }
                // Fits: it is less than the chunk's length.
                chunk.truncate(self.remaining as usize);
                self.remaining = 0;
                self.body = None;
                Ok(Some(chunk))
            }
            None if self.remaining == 0 => {
                self.body = None;
                self.endpoint.succeeded();
                Ok(None)
            }
            None => {
                let what = format!("the body ended {} bytes too early", self.remaining);
                Err(Failure::later(body.request(), what, None))
            }
        }
    }
}

/// `bytes a-b/total`, for the header of a 206.
pub(super) fn content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_and_nonsense_is_not() {
        assert_eq!(content_range("bytes 0-1/10"), Some((0, 1, Some(10))));
        assert_eq!(content_range("bytes 5-5/*"), Some((5, 5, None)));
        for bad in [
            "",
            "bytes */10",
            "bytes 2-1/10",
            "bytes 0-10/10",
            "bytes 0-/10",
            "0-1/10",
            "bytes 0-99999999999999999999/*",
        ] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
