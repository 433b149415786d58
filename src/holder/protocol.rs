//! What the daemon asks the holder: one request per connection, one reply, fixed heads.
//!
//! ```text
//! request  "soci" | version u8 | what u8     then, for Keep: the parameters as JSON, and device and journal attached
//! reply    "soci" | version u8 | what u8     then, for First and Resumed: the parameters as JSON, and device and journal attached
//! ```
//!
//! The journal is there only where the kernel cannot repeat requests (`crate::fs::journal`).
#![forbid(unsafe_code)]

const MAGIC: [u8; 4] = *b"soci";
/// Raised when a holder of this release could be misunderstood by a daemon of another: the two are *not* restarted together.
const VERSION: u8 = 1;
const HEAD: usize = 6;
/// A head and the parameters: a dozen numbers in JSON. Bounds what either side reads.
pub(super) const MAX_MESSAGE: usize = 4096;

/// What a peer wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// The descriptor.
    Give,
    /// Only to know whether there is one.
    Status,
    /// To hand the descriptor in.
    Keep,
    /// The holder to end.
    Stop,
}

/// Whether a holder has what it is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Holding,
    Empty,
}

/// What a peer is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// The descriptor of a mount that nobody has served yet.
    First,
    /// The descriptor of a mount that somebody served before.
    Resumed,
    Is(Status),
    /// Understood and done.
    Done,
    /// Not understood, or not possible now.
    Refused,
}

impl Request {
    pub(super) fn encode(self) -> [u8; HEAD] {
        head(match self {
            Request::Give => 1,
            Request::Status => 2,
            Request::Keep => 3,
            Request::Stop => 4,
        })
    }

    /// The request and what follows its head; `None` for anything else.
    pub(super) fn decode(message: &[u8]) -> Option<(Request, &[u8])> {
        let (what, rest) = split(message)?;
        let request = match what {
            1 => Request::Give,
            2 => Request::Status,
            3 => Request::Keep,
            4 => Request::Stop,
            _ => return None,
        };
        // Only Keep has something to add.
        (request == Request::Keep || rest.is_empty()).then_some((request, rest))
    }
}

impl Reply {
    pub(super) fn encode(self) -> [u8; HEAD] {
        head(match self {
            Reply::First => 1,
            Reply::Resumed => 2,
            Reply::Is(Status::Holding) => 3,
            Reply::Is(Status::Empty) => 4,
            Reply::Done => 5,
            Reply::Refused => 6,
        })
    }

    pub(super) fn decode(message: &[u8]) -> Option<(Reply, &[u8])> {
        let (what, rest) = split(message)?;
        let reply = match what {
            1 => Reply::First,
            2 => Reply::Resumed,
            3 => Reply::Is(Status::Holding),
            4 => Reply::Is(Status::Empty),
            5 => Reply::Done,
            6 => Reply::Refused,
            _ => return None,
        };
        Some((reply, rest))
    }
}

/// What to say of a message that cannot be decoded.
pub(super) fn misunderstood(message: &[u8]) -> String {
    match message {
        message if message.starts_with(&MAGIC) => match message.get(MAGIC.len()) {
            Some(&VERSION) | None => "soci-mount gave an answer that this daemon does not know".to_owned(),
            Some(theirs) => format!(
                "soci-mount speaks version {theirs} of their protocol, this daemon version {VERSION}: install both from the same package"
            ),
        },
        _ => "what answers is not soci-mount".to_owned(),
    }
}

fn head(what: u8) -> [u8; HEAD] {
    let [s, o, c, i] = MAGIC;
    [s, o, c, i, VERSION, what]
}

fn split(message: &[u8]) -> Option<(u8, &[u8])> {
    let (head, rest) = message.split_at_checked(HEAD)?;
    match head {
        [s, o, c, i, VERSION, what] if [*s, *o, *c, *i] == MAGIC => Some((*what, rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_holder_of_another_version_is_named_as_such() {
        let mut newer = Reply::First.encode();
        newer[4] = VERSION + 1;
        assert_eq!(Reply::decode(&newer), None);
        let said = misunderstood(&newer);
        assert!(said.contains("speaks version 2") && said.contains("this daemon version 1"), "{said}");
        assert!(misunderstood(&head(99)).contains("does not know"));
        assert!(misunderstood(b"GET / HTTP/1.1").contains("not soci-mount"));
    }

    proptest! {
        #[test]
        fn proptest_decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..32), what: u8) {
            let _ = (Request::decode(&bytes), Reply::decode(&bytes));
            let mut almost = head(what).to_vec();
            almost.extend(bytes);
            if let Some((request, rest)) = Request::decode(&almost) {
                prop_assert_eq!([&request.encode()[..], rest].concat(), almost.clone());
            }
            if let Some((reply, rest)) = Reply::decode(&almost) {
                prop_assert_eq!([&reply.encode()[..], rest].concat(), almost);
            }
        }
    }
}
