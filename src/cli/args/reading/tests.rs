//! Command lines and what they mean.

use super::*;
use crate::cli::args::{Convert, Global};
use std::{path::PathBuf, time::Duration};

fn read(line: &str) -> Result<Args, NotACommand> {
    parse(line.split_whitespace().map(Into::into))
}

fn convert(line: &str) -> (Global, Convert) {
    match read(line) {
        Ok(Args { global, command: Some(Command::Convert(convert)), .. }) => (global, *convert),
        other => panic!("{line}: {other:?}"),
    }
}

fn usage(line: &str) -> String {
    match read(line) {
        Err(NotACommand::Usage { message, .. }) => message,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn clap_accepts_the_definitions() {
    Args::command().debug_assert();
}

#[test]
fn a_flag_name_takes_a_value_everywhere_or_nowhere() {
    fn walk(command: &clap::Command, known: &HashMap<String, Flag>) {
        for arg in command.get_arguments().filter(|a| a.get_long().is_some()) {
            let flag = &known[arg.get_long().unwrap()];
            assert_eq!(flag.takes_value, arg.get_action().takes_values() && !arg.is_require_equals_set(), "{arg}");
            if let Some(short) = arg.get_short() {
                assert_eq!(known[&short.to_string()].long, arg.get_long().unwrap(), "{arg}");
            }
        }
        command.get_subcommands().for_each(|sub| walk(sub, known));
    }
    let mut tree = Args::command();
    tree.build();
    let mut known = HashMap::new();
    flags(&tree, &mut known);
    walk(&tree, &known);
}

#[test]
fn global_flags_stand_before_or_after_the_command_with_one_dash_or_two() {
    for line in [
        "--address /a --namespace n --content-store soci --root /r --timeout 30s convert in out",
        "convert in --address=/a out -namespace n -content-store=soci --root /r -timeout 30s",
        "-a /a convert -n n in --content-store soci -root=/r out --timeout=30s",
    ] {
        let (global, convert) = convert(line);
        assert_eq!((global.address.as_str(), global.namespace.as_str()), ("/a", "n"), "{line}");
        assert_eq!((global.content_store.as_str(), global.timeout), ("soci", Duration::from_secs(30)), "{line}");
        assert_eq!((global.root, convert.operands.len()), (PathBuf::from("/r"), 2), "{line}");
    }
}

#[test]
fn values_may_begin_with_a_dash_and_bools_may_be_given_one() {
    let (_, c) = convert(
        "convert --span-size -1 --min-layer-size 0x_10 -force=false --standalone=true --prefetch-file -force a b",
    );
    let i = &c.indexing;
    assert_eq!((i.span_size, i.min_layer_size, i.force, c.standalone), (-1, 16, false, true));
    assert_eq!(i.prefetch_file, ["-force"]);
    let (_, c) = convert("convert -f -p linux/amd64 --platform linux/arm64,linux/386 -- -a b");
    assert_eq!(c.indexing.platforms.platform, ["linux/amd64", "linux/arm64", "linux/386"]);
    assert_eq!((c.indexing.force, c.operands), (true, vec!["-a".into(), "b".into()]));
    assert_eq!(convert("convert --span-size 1 --span-size 2 a b").1.indexing.span_size, 2);
}

#[test]
fn wrong_flags_are_named_as_the_go_tools_name_them() {
    assert!(
        usage("convert --span-size 99999999999999999999 a b")
            .starts_with("invalid value \"99999999999999999999\" for flag -span-size")
    );
    assert!(usage("convert --min-layer-size x a b").starts_with("invalid value \"x\" for flag -min-layer-size"));
    assert!(
        usage("convert --format zip a b")
            .contains("unsupported output format \"zip\": must be \"oci-archive\" or \"oci-dir\"")
    );
    assert_eq!(usage("convert --bogus"), "flag provided but not defined: -bogus");
    assert_eq!(usage("ztoc info --force"), "flag provided but not defined: -force");
    assert_eq!(usage("convert --span-size"), "flag needs an argument: -span-size");
    assert!(usage("convert --force=maybe").starts_with("invalid value \"maybe\" for flag -force"));
}

#[test]
fn commands_that_do_not_exist_are_named() {
    for name in ["bogus", "image", "rebuild_db"] {
        assert_eq!(read(name).err(), Some(NotACommand::UnknownCommand(name.into())));
    }
    assert_eq!(read("index bogus").err(), Some(NotACommand::UnknownCommand("bogus".into())));
    assert_eq!(read("help bogus").err(), Some(NotACommand::UnknownCommand("bogus".into())));
}

#[test]
fn what_nerdctl_says_is_understood() {
    for line in [
        "--address /a --namespace n create --all-platforms --span-size 1 --min-layer-size 2 r",
        "--address /a --namespace n create --platform linux/amd64 --platform linux/arm64 r",
        "--address /a --namespace n push --all-platforms --skip-verify --plain-http --hosts-dir /a,/b r",
        "--address /a --namespace n push -k -u me:secret --snapshotter soci --refresh x --http-dump --http-trace r",
        "--address /a --namespace n convert --all-platforms --span-size 1 a b",
    ] {
        assert!(read(line).is_ok(), "{line}: {:?}", read(line));
    }
}

#[test]
fn help_and_version_are_printed() {
    for (line, part) in [
        ("", "convert"),
        ("-h", "convert"),
        ("help convert", "--span-size"),
        ("h ztoc", "get-file"),
        ("convert --help", "--span-size"),
        ("ztoc", "get-file"),
        ("index info -h", "--layout"),
        ("--version", "soci version "),
        ("-v", "soci version "),
    ] {
        match read(line) {
            Err(NotACommand::Print(text)) => assert!(text.contains(part), "{line}: {text}"),
            other => panic!("{line}: {other:?}"),
        }
    }
}
