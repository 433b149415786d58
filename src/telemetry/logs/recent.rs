//! The last warnings and errors of the catalog, for `soci status`: whoever asks what is wrong need not find the journal first.

use super::Receiver;
use crate::telemetry::{
    catalog::{self, Message},
    status::Said,
};
use serde_json::{Map, Value};
use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};
use tracing::{Level, Metadata};

/// Messages kept. A page of a terminal.
const MOST: usize = 40;
/// Characters kept of one text.
const TEXT: usize = 1000;

/// What was said lately.
pub(super) struct Recent {
    /// Leaf lock, held for moments.
    said: Mutex<VecDeque<Said>>,
}

/// Of this process, as there is one log.
pub(super) static RECENT: Recent = Recent { said: Mutex::new(VecDeque::new()) };

impl Recent {
    pub(super) fn all(&self) -> Vec<Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl Receiver for &'static Recent {
    fn event(&self, metadata: &Metadata<'_>, fields: Map<String, Value>) {
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => return,
        };
        let Some(message) = text(catalog::ID_FIELD).as_deref().and_then(Message::with_id) else { return };
        let mut words = text("message").unwrap_or_default();
        if let Some(error) = text("error") {
            words = format!("{words}: {error}");
        }
        let said = Said {
            at: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            level: level.to_owned(),
            message_id: message.id().to_owned(),
            subject: message.entry().subject.to_owned(),
            text: words.chars().take(TEXT).collect(),
            image: text("image"),
            layer: text("layer"),
            reason: text("reason"),
            times: 1,
        };
        let mut all = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |other: &&mut Said| {
            (&other.message_id, &other.image, &other.layer, &other.reason)
                == (&said.message_id, &said.image, &said.layer, &said.reason)
        };
        if let Some(last) = all.back_mut().filter(same) {
            let times = last.times.saturating_add(1);
            *last = Said { times, ..said };
            return;
        }
        if all.len() >= MOST {
            all.pop_front();
        }
        all.push_back(said);
    }
}
