//! What the Go CLI said to each of these command lines, in this order, against a containerd and a registry: ours must do the same, with
//! the same digests, exit codes and columns. (`tests/data/golden-cli.json`.)

use super::lab::{Lab, case, eventually, golden};
use crate::support::{
    containerd::Version,
    registry::{Kind, get},
};
use serde_json::Value;

/// The host that the transcript names.
const HOST: &str = "registry.example:5000";

/// Where our words are others, or our end is: the arguments, what we say, and why. Wherever else Go fails we fail with its words, and
/// may go on from there with what to do.
const DEVIATIONS: [(&str, i32, &str, &str); 3] = [
    (
        "convert --min-layer-size 0 registry.example:5000/gold:latest bad ref",
        1,
        "the destination image must be a tagged ref of the form \"registry/repository:tag\": could not parse reference: invalid image \
         reference \"bad ref\"",
        "Go shows the URL that it made of the reference to parse it",
    ),
    (
        "rebuild-db",
        0,
        "",
        "Go looks for containerd's content at a fixed path and fails where it is elsewhere; we ask containerd",
    ),
    ("--version", 0, "", "the version is ours"),
];

/// Cells of a table, without the time that has passed.
fn cells(text: &str) -> Vec<Vec<String>> {
    let cell = |cell: &str| match cell.strip_suffix(" ago") {
        Some(_) => "ago".to_owned(),
        None => cell.trim().to_owned(),
    };
    let row = |line: &str| line.split("    ").map(str::trim).filter(|c| !c.is_empty()).map(cell).collect();
    text.lines().map(row).collect()
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "the transcript is about linux/amd64")]
fn privileged_the_go_clis_transcript_is_replayed() {
    let lab = Lab::new(Version::V16);
    let (_registry_root, registry) = lab.registry(Kind::Docker28);
    let layouts = golden();
    let transcript: Value = serde_json::from_slice(include_bytes!("../data/golden-cli.json")).unwrap();
    let here = |text: &str| text.replace(HOST, &registry.host);

    // `gold` was made of the one manifest, `two` of a list in a list.
    let gold = case(&layouts, "single");
    registry.push(&gold, "gold", "latest");
    lab.fetch(&here("registry.example:5000/gold:latest"));
    lab.import(&case(&layouts, "two_platforms_all"), &here("registry.example:5000/two:v1"));
    // The transcript begins after a first run of one of its commands ("again: same digest").
    lab.soci(["create", "--min-layer-size", "100000", &here("registry.example:5000/gold:latest")]).ok();

    let steps = transcript["steps"].as_array().unwrap();
    let mut deviations = 0;
    for step in steps {
        let args: Vec<&str> = step["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
        let line = args.join(" ");
        // containerd collects in its own time what Go found collected: the index that a newer one replaced, …
        if line == "ztoc list --image-ref registry.example:5000/gold:latest" {
            eventually("an index that was replaced is collected", || {
                !lab.has("sha256:6893f4b9ab64fb5e795073869a9ed80fa908bc08032a958b2ca6b6360a6d62eb")
            });
        }
        // … and the zTOCs of the one that was removed.
        if line == "rebuild-db" {
            for ztoc in [
                "080d8e44836ee45702d8262c01fb3785f6c3bec55c3458e6505eb553f5b6c7cd",
                "efe007768a925eea31cb45ce7c52feb812649e82cfe40ac5bc5846e8fd27ad9a",
            ] {
                eventually("zTOCs of a removed index are collected", || !lab.has(&format!("sha256:{ztoc}")));
            }
        }
        let ran = lab.soci(args.iter().map(|arg| here(arg)));
        let (code, stdout, stderr) = (
            step["exit"].as_i64().unwrap() as i32,
            here(step["stdout"].as_str().unwrap()),
            step["stderr"].as_str().unwrap(),
        );
        if let Some((_, code, says, _)) = DEVIATIONS.iter().find(|(args, ..)| *args == line) {
            deviations += 1;
            assert_eq!(ran.code, *code, "{line}: {}", ran.stderr);
            assert!(ran.stderr.contains(says), "{line}: {}", ran.stderr);
            continue;
        }
        assert_eq!(ran.code, code, "{line}: {}", ran.stderr);
        if stdout.starts_with("DIGEST") {
            assert_eq!(cells(ran.text()), cells(&stdout), "{line}");
        } else {
            assert_eq!(sorted(ran.text()), sorted(&stdout), "{line}");
        }
        let begins = here(stderr.trim_end());
        assert!(ran.stderr.starts_with(&begins), "{line}: {:?} does not begin with {begins:?}", ran.stderr);
        assert_eq!(ran.stderr.is_empty(), stderr.is_empty(), "{line}: {}", ran.stderr);
    }
    assert_eq!(deviations, DEVIATIONS.len());

    let tag = "sha256-28f7a620a31fa83399ad718bf529c35451111ae4631c9d91d064880f27c29b7a";
    let (status, index) = get(&format!("http://{}/v2/gold/manifests/{tag}", registry.host));
    assert_eq!(status, 200);
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index, transcript["referrers_fallback_tag_after_push"]);
    assert_eq!(lab.leases(), Vec::<String>::new());
    lab.bbolt();
}
