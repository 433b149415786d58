//! What packages are checked with finds what it is to find. The packages themselves are made and tried by `make rpm` and `make vm-test`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

fn script(name: &str) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(name));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Whether a package with these requirements may be made, and what was said.
fn requires(distribution: &str, needs: &str) -> (bool, String) {
    let mut child = script("check-requires.sh").arg(distribution).spawn().unwrap();
    child.stdin.take().unwrap().write_all(needs.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
}

/// What the packages of 0.15.0 require, of both architectures.
const USUAL: &str = "/bin/sh\nca-certificates\nconfig(soci-snapshotter) = 0.15.0-1.amzn2\nld-linux-aarch64.so.1()(64bit)\n\
    ld-linux-x86-64.so.2(GLIBC_2.3)(64bit)\nlibc.so.6(GLIBC_2.2.5)(64bit)\nlibc.so.6(GLIBC_2.25)(64bit)\nlibdl.so.2()(64bit)\n\
    libgcc_s.so.1(GCC_4.2.0)(64bit)\nlibm.so.6()(64bit)\nlibpthread.so.0(GLIBC_2.12)(64bit)\nrpmlib(CompressedFileNames) <= 3.0.4-1\n\
    rpmlib(FileDigests) <= 4.6.0-1\nrpmlib(PayloadFilesHavePrefix) <= 4.0-1\nrtld(GNU_HASH)\nsystemd\n";

#[test]
fn a_package_that_needs_what_a_distribution_does_not_have_is_refused() {
    for distribution in ["amzn2", "amzn2023"] {
        assert_eq!(requires(distribution, USUAL), (true, String::new()));
    }
    for (distribution, need, named) in [
        ("amzn2", "libc.so.6(GLIBC_2.27)(64bit)", "glibc 2.26"),
        ("amzn2023", "libm.so.6(GLIBC_2.35)(64bit)", "glibc 2.34"),
        ("amzn2", "rpmlib(PayloadIsZstd) <= 5.4.18-1", "rpm"),
        ("amzn2", "rpmlib(RichDependencies) <= 4.12.0-1", "rpm"),
        ("amzn2", "libssl.so.3()(64bit)", "libssl.so.3"),
        ("amzn2", "container-selinux", "container-selinux"),
        ("amzn2023", "/usr/bin/python3", "python3"),
    ] {
        let (good, said) = requires(distribution, &format!("{USUAL}{need}\n"));
        assert!(!good && said.contains(need) && said.contains(named), "{distribution} {need}: {said}");
    }
    assert!(requires("amzn2023", "container-selinux\nlibc.so.6(GLIBC_2.34)(64bit)\n").0);
}

#[test]
fn a_program_for_a_newer_glibc_is_refused() {
    // This very program names some version of glibc, which is newer than 2.2.5 and not newer than 2.99.
    let own = std::env::current_exe().unwrap();
    let check = |version: &str| script("check-glibc.sh").arg(version).arg(&own).output().unwrap();
    assert!(check("2.99").status.success());
    let refused = check("2.3");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("newer than 2.3"));
}

#[test]
fn a_program_that_needs_a_loader_is_no_part_of_the_tar() {
    let directory = tempfile::tempdir().unwrap();
    let check = |path: &Path| {
        let done = script("check-static.sh").arg(path).output().unwrap();
        (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let source = directory.path().join("nothing.c");
    std::fs::write(&source, "int main(void) { return 0; }").unwrap();
    for (flag, good, said) in [("-static", true, ""), ("-static-pie", true, ""), ("-pie", false, "interpreter")] {
        let program = directory.path().join("nothing");
        let made = Command::new("cc").arg(flag).arg("-o").arg(&program).arg(&source).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let (found, why) = check(&program);
        assert!(found == good && why.contains(said), "{flag}: {why}");
    }
    let (good, said) = check(&source);
    assert!(!good && said.contains("is no program"), "{said}");
}
