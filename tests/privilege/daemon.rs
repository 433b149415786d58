//! What the daemon does to itself before it reads its first byte, in a process of its own.

use super::{run, status_row};
use crate::support::needs_root;
use soci::sys::{Confinement, drop_all_capabilities, process::SingleThread, seccomp};
use std::process::Command;

#[test]
fn privileged_a_confined_daemon_can_serve_and_run_helpers_and_nothing_else() {
    needs_root();
    let output = run(Command::new(std::env::current_exe().expect("own path")).args([
        "--exact",
        "privilege::daemon::helper_a_confined_daemon",
        "--ignored",
        "--nocapture",
    ]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("CONFINED"), "{text}");
}

#[test]
#[ignore = "run by the test above"]
fn helper_a_confined_daemon() {
    // The test harness has a second thread; the child of a fork has one.
    // SAFETY: the other thread of this process only waits for this one, so it holds no lock that the child could need.
    match unsafe { nix::unistd::fork() }.expect("fork") {
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).expect("wait");
            assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
        nix::unistd::ForkResult::Child => {
            let served = std::panic::catch_unwind(be_confined);
            std::process::exit(i32::from(served.is_err()));
        }
    }
}

fn be_confined() {
    let alone = SingleThread::prove().expect("the only thread");
    drop_all_capabilities().expect("dropped");
    assert_eq!(seccomp::confine(seccomp::Role::Daemon, &alone).expect("filtered"), Confinement::Applied);
    drop_all_capabilities().expect("what a confined process starts can drop the nothing it has");

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a socket");
        tokio::net::TcpStream::connect(listener.local_addr().expect("address")).await.expect("a connection");
        let _addresses = tokio::net::lookup_host("localhost:1").await.expect("the resolver").count();
        let helper = tokio::process::Command::new("true").status().await.expect("a credential helper");
        assert!(helper.success());
        tokio::task::spawn_blocking(|| std::fs::read("/proc/self/status")).await.expect("join").expect("a file");
    });
    for row in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status_row(std::process::id(), row), 16), Ok(0), "{row}");
    }
    assert_eq!(status_row(std::process::id(), "NoNewPrivs"), "1");
    assert_eq!(status_row(std::process::id(), "Seccomp"), "2");

    let refused = |what: &str, outcome: Result<(), rustix::io::Errno>| {
        assert_eq!(outcome, Err(rustix::io::Errno::PERM), "{what}");
    };
    let none = rustix::mount::MountFlags::empty();
    refused("mount", rustix::mount::mount("none", "/mnt", "tmpfs", none, None));
    refused("fsopen", rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::empty()).map(drop));
    for flag in [nix::sched::CloneFlags::CLONE_NEWUSER, nix::sched::CloneFlags::CLONE_NEWNET] {
        let outcome = nix::sched::unshare(flag).map_err(|e| rustix::io::Errno::from_raw_os_error(e as i32));
        refused("a namespace", outcome);
    }
    use rustix::net::{AddressFamily, SocketType};
    refused("a packet socket", rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, None).map(drop));
    refused("a vsock", rustix::net::socket(AddressFamily::VSOCK, SocketType::STREAM, None).map(drop));
    refused("a host name", rustix::system::sethostname(b"x"));
    eprintln!("CONFINED");
}
