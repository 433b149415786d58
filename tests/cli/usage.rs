//! The command line itself: flags, commands, exit codes.

use super::{Layout, convert, layer, soci};

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn the_version_is_one_that_nerdctl_can_read() {
    for flag in ["--version", "-v"] {
        let ran = soci([flag]).ok();
        let words: Vec<&str> = ran.text().split_whitespace().collect();
        assert_eq!((&words[..2], words.len()), (&["soci", "version"][..], 4), "{}", ran.text());
        let numbers: Vec<u32> = words[2].trim_start_matches('v').split('.').map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers.len(), 3);
    }
}

#[test]
fn no_command_is_help_and_an_unknown_one_is_exit_status_three() {
    for line in ["", "help", "-h", "ztoc", "index", "prefetch", "convert --help", "ztoc help info"] {
        let ran = soci(words(line));
        if line == "ztoc help info" {
            assert_eq!(ran.code, 3);
            continue;
        }
        assert!(ran.ok().text().contains("Usage: soci"), "{line}");
    }
    for (line, name) in
        [("bogus", "bogus"), ("image rpull", "image"), ("rebuild_db", "rebuild_db"), ("--debug pull x", "pull")]
    {
        let ran = soci(words(line));
        assert_eq!((ran.code, ran.stderr.as_str()), (3, format!("No help topic for '{name}'\n").as_str()), "{line}");
        assert!(ran.stdout.is_empty());
    }
}

#[test]
fn wrong_values_are_told_in_the_words_that_scripts_look_for() {
    for (line, part) in [
        ("convert", "soci: source image needs to be specified\n"),
        ("convert a", "soci: destination needs to be specified\n"),
        ("convert --standalone --optimizations bogus a b", "optimization bogus is not a valid optimization [xattr]"),
        ("convert --standalone --span-size -5 a b", "span size must be >= 0"),
        ("convert --standalone --min-layer-size -1 a b", "min layer size must be >= 0"),
        (
            "convert --standalone --min-layer-size 9223372036854775808 a b",
            "invalid value \"9223372036854775808\" for flag -min-layer-size",
        ),
        ("convert --standalone --span-size 1x a b", "invalid value \"1x\" for flag -span-size"),
        ("convert --format bogus a b", "unsupported output format \"bogus\": must be \"oci-archive\" or \"oci-dir\""),
        ("convert --standalone --platform bogus/ a b", "could not parse platform bogus/: \"\" is an invalid component"),
        ("convert --standalone --prefetch-files-json /nope a b", "failed to parse prefetch files: /nope"),
        ("convert --standalone /nope/in b", "failed to access input /nope/in: "),
        ("convert --bogus a b", "Incorrect Usage: flag provided but not defined: -bogus"),
        ("convert a b", "the destination image must be a tagged ref"),
        ("convert --standalone --span-size 4096 a b", "a span size of 4096 bytes makes no sense: spans from 65536"),
        ("convert --standalone --max-memory 7x a b", "not a number of bytes"),
        ("push", "please provide an image reference to push"),
        (
            "push --existing-index bogus x",
            "unexpected value for flag existing-index: bogus, expected types [warn skip allow]",
        ),
        ("create", "source image needs to be specified"),
        ("index info", "invalid checksum digest format"),
        ("index info bogus", "invalid checksum digest format"),
        ("ztoc info", "invalid checksum digest format"),
        ("ztoc get-file sha256:00", "please provide both a ztoc digest and a filename to extract"),
        ("ztoc get-file a b c", "please provide both a ztoc digest and a filename to extract"),
    ] {
        soci(words(line)).failed(&[part]);
    }
}

#[test]
fn every_global_flag_is_accepted_before_and_after_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let image = Layout::new(dir.path().join("in"));
    let blob = image.blob(super::LAYER, &layer("a", b"content"));
    let manifest = image.image("linux/amd64", vec![blob]);
    image.top(vec![manifest]);
    let (source, out) = (image.0.to_str().unwrap(), dir.path().join("out.tar"));
    let globals = ["-a", "/s", "-namespace", "n", "--timeout=1m", "--debug", "-content-store", "soci", "--root=/r"];
    let command = ["-standalone", "--min-layer-size", "0x0", source, out.to_str().unwrap()];
    soci(globals.iter().chain(&["convert"]).chain(&command)).ok();
    soci(["convert"].iter().chain(&command).chain(&globals)).ok();
    assert!(convert(&image.0, &dir.path().join("out"), &["--force", "--all-platforms"]).code == 0);
}
