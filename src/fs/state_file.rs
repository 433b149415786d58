//! `/.soci-snapshotter/<layer digest>.json`: how much of a layer is here, readable from inside a container.
//!
//! The kernel caches the content of every file (nothing is ever opened here, so nothing can ask for direct I/O) and drops it
//! when a file's size changes. So the content is frozen whenever the kernel asks for attributes, which are never cached;
//! reads get the frozen text; and a text that differs from the one before it also differs in length, by a blank if need be.

use super::tree::Layer;
use std::sync::{Mutex, PoisonError};

/// Name of the hidden directory in every layer's root.
pub const DIRECTORY: &[u8] = b".soci-snapshotter";

/// What the kernel was last told.
#[derive(Default)]
pub struct StateFile {
    frozen: Mutex<Frozen>,
}

#[derive(Default)]
struct Frozen {
    text: String,
    /// Ends in a blank and a newline, because the text before it had this one's length.
    padded: bool,
}

impl Frozen {
    fn len(&self) -> usize {
        self.text.len() + usize::from(self.padded)
    }
}

impl StateFile {
    /// Name of the file in [`DIRECTORY`].
    pub fn name(layer: &Layer) -> String {
        format!("{}.json", layer.data.digest())
    }

    /// Takes the layer's present state; answers its length.
    pub fn refresh(&self, layer: &Layer) -> u64 {
        let text = render(layer.last_error().as_deref(), layer);
        let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        if frozen.text != text {
            *frozen = Frozen { padded: text.len() == frozen.len(), text };
        }
        frozen.len() as u64
    }

    /// The bytes of the last refresh from `offset` on, at most `size`.
    pub fn read(&self, offset: u64, size: u32) -> Vec<u8> {
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let line = frozen.text.strip_suffix('\n').unwrap_or_default();
        let end = if frozen.padded { " \n" } else { "\n" };
        let whole = [line, end].concat();
        let rest = usize::try_from(offset).ok().and_then(|offset| whole.as_bytes().get(offset..)).unwrap_or(&[]);
        rest[..rest.len().min(size as usize)].to_vec()
    }
}

/// One line of JSON, keys in the order of the Go snapshotter, and its way to print a float: 100, not 100.0.
fn render(error: Option<&str>, layer: &Layer) -> String {
    let (digest, size, fetched) = (layer.data.digest(), layer.data.compressed_size(), layer.data.fetched());
    let percent = if size == 0 { 100.0 } else { fetched as f64 / size as f64 * 100.0 };
    let error = error.map(|error| format!("\"error\":{},", serde_json::Value::from(error))).unwrap_or_default();
    format!(
        "{{{error}\"digest\":\"{digest}\",\"size\":{size},\"fetchedSize\":{fetched},\"fetchedPercent\":{percent}}}\n"
    )
}

#[cfg(test)]
mod tests {
    use crate::fs::testing::{Memory, layer_of};
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    #[test]
    fn the_text_is_one_line_of_json_with_the_go_keys() {
        let memory = Arc::new(Memory::new(vec![0; 200]));
        let layer = layer_of(memory.clone(), []);
        memory.fetched.store(50, Ordering::Relaxed);
        layer.state_file.refresh(&layer);
        let text = String::from_utf8(layer.state_file.read(0, 4096)).unwrap();
        let digest = layer.data.digest();
        assert_eq!(
            text,
            format!("{{\"digest\":\"{digest}\",\"size\":200,\"fetchedSize\":50,\"fetchedPercent\":25}}\n")
        );
        memory.fetched.store(200, Ordering::Relaxed);
        layer.set_last_error("no \"luck\"".into());
        layer.state_file.refresh(&layer);
        let text = String::from_utf8(layer.state_file.read(0, 4096)).unwrap();
        assert!(text.starts_with("{\"error\":\"no \\\"luck\\\"\",\"digest\""), "{text}");
        assert!(text.ends_with("\"fetchedPercent\":100}\n"), "{text}");
    }

    #[test]
    fn texts_that_follow_each_other_never_have_the_same_length_unless_they_are_the_same() {
        let memory = Arc::new(Memory::new(vec![0; 1000]));
        let layer = layer_of(memory.clone(), []);
        let mut last = (0, Vec::new());
        for fetched in [100, 200, 200, 300, 300, 400, 500, 1000] {
            memory.fetched.store(fetched, Ordering::Relaxed);
            let len = layer.state_file.refresh(&layer);
            let text = layer.state_file.read(0, 4096);
            assert_eq!(text.len() as u64, len);
            assert_eq!(len == last.0, text == last.1, "{fetched}");
            assert!(serde_json::from_slice::<serde_json::Value>(&text).unwrap()["fetchedSize"] == fetched);
            last = (len, text);
        }
    }

    #[test]
    fn reads_are_cut_at_the_end_and_empty_beyond_it() {
        let layer = layer_of(Arc::new(Memory::new(vec![0; 10])), []);
        let len = layer.state_file.refresh(&layer);
        assert_eq!(layer.state_file.read(len - 1, 100), b"\n");
        assert_eq!(layer.state_file.read(len, 100), b"");
        assert_eq!(layer.state_file.read(u64::MAX, 100), b"");
        assert_eq!(layer.state_file.read(0, 1), b"{");
    }
}
