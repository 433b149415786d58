//! Prefetch artifacts: which spans should be fetched when a container starts (`formats.md` 6). Pure, but for reading the list.

use super::IndexingError;
use crate::{
    oci::{Digest, to_canonical_json},
    ztoc::Ztoc,
};
use serde::Serialize;
use std::{collections::HashMap, fs::File, io::Read, path::Path};

/// Largest list of paths that is read.
const MAX_LIST: u64 = 16 << 20;

/// Spans `start..=end` of a zTOC.
pub type Range = (u32, u32);

/// The paths asked for, cleaned: the flags first, then the strings of the JSON file.
pub fn paths(flags: &[String], list: Option<&Path>) -> Result<Vec<String>, IndexingError> {
    let mut paths: Vec<String> = flags.to_vec();
    if let Some(list) = list {
        let failed = |why: String| IndexingError::PrefetchList { path: list.to_owned(), why };
        let mut text = String::new();
        let file = File::open(list).map_err(|e| failed(e.to_string()))?;
        file.take(MAX_LIST + 1).read_to_string(&mut text).map_err(|e| failed(e.to_string()))?;
        if text.len() as u64 > MAX_LIST {
            return Err(failed(format!("it has more than {MAX_LIST} bytes")));
        }
        paths.extend(serde_json::from_str::<Vec<String>>(&text).map_err(|e| failed(e.to_string()))?);
    }
    let paths = paths.iter().map(|path| path.trim()).filter(|path| !path.is_empty());
    Ok(paths.map(clean).collect())
}

/// `path` as an entry of a tar: from the root, without `.`, `..` and repeated slashes.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// For each path, the spans of the first file of this zTOC that has exactly this name.
pub fn find(paths: &[String], ztoc: &Ztoc<'_>) -> Vec<Option<Range>> {
    let mut wanted: HashMap<&[u8], Vec<usize>> = HashMap::new();
    for (at, path) in paths.iter().enumerate() {
        wanted.entry(path.as_bytes()).or_default().push(at);
    }
    let mut found = vec![None; paths.len()];
    if wanted.is_empty() {
        return found;
    }
    for file in ztoc.files() {
        if let Some(places) = wanted.remove(file.name) {
            // The end is exclusive, and still counts its span: the Go CLI does, and the bytes of the artifact show it.
            let start = span(ztoc, file.offset);
            let range = (start, span(ztoc, file.offset.saturating_add(file.size)).max(start));
            places.into_iter().for_each(|at| found[at] = Some(range));
        }
    }
    found
}

fn span(ztoc: &Ztoc<'_>, offset: u64) -> u32 {
    u32::try_from(ztoc.spans().span_at(offset)).unwrap_or(u32::MAX)
}

/// The artifact for these ranges of one layer: sorted, merged where they touch.
pub fn artifact(mut ranges: Vec<Range>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Artifact {
        version: &'static str,
        prefetch_spans: Vec<Spans>,
    }
    #[derive(Serialize)]
    struct Spans {
        start_span: u32,
        end_span: u32,
    }
    ranges.sort_unstable();
    let mut prefetch_spans: Vec<Spans> = Vec::new();
    for (start_span, end_span) in ranges {
        match prefetch_spans.last_mut() {
            Some(last) if start_span <= last.end_span.saturating_add(1) => last.end_span = last.end_span.max(end_span),
            _ => prefetch_spans.push(Spans { start_span, end_span }),
        }
    }
    to_canonical_json(&Artifact { version: "1.0", prefetch_spans })
}

/// Who provides each path: the topmost layer that has it. `layers` are bottom first; the result has, for each layer digest,
/// its ranges, and the paths that no layer has.
pub fn assign<'a>(
    paths: &'a [String],
    layers: &[(Digest, &[Option<Range>])],
) -> (HashMap<Digest, Vec<Range>>, Vec<&'a str>) {
    let mut ranges: HashMap<Digest, Vec<Range>> = HashMap::new();
    let mut nowhere = Vec::new();
    for (at, path) in paths.iter().enumerate() {
        let hit =
            layers.iter().rev().find_map(|(digest, found)| found.get(at).copied().flatten().map(|r| (*digest, r)));
        match hit {
            Some((digest, range)) => ranges.entry(digest).or_default().push(range),
            None => nowhere.push(path.as_str()),
        }
    }
    (ranges, nowhere)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_artifact_of_the_specification() {
        let bytes = artifact(vec![(10, 12), (2, 3), (0, 1)]);
        assert_eq!(Digest::of(&bytes).hex(), "949b824db9727b0dff0725c53956688b4e7f1a83a1cfab41bc5faca2b8aa88b5");
    }

    #[test]
    fn paths_are_cleaned_as_names_in_a_layer() {
        for (path, want) in [("/a/b", "a/b"), ("a//b/", "a/b"), ("./a/../b", "b"), ("/../../x", "x"), ("/", "")] {
            assert_eq!(clean(path), want, "{path}");
        }
    }

    #[test]
    fn the_topmost_layer_that_has_a_path_provides_it() {
        let paths = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let (bottom, top) = (Digest::of(b"1"), Digest::of(b"2"));
        let layers: [(Digest, &[Option<Range>]); 2] =
            [(bottom, &[Some((0, 0)), Some((1, 1)), None]), (top, &[Some((5, 6)), None, None])];
        let (ranges, nowhere) = assign(&paths, &layers);
        assert_eq!((&ranges[&bottom], &ranges[&top], nowhere), (&vec![(1, 1)], &vec![(5, 6)], vec!["c"]));
    }
}
