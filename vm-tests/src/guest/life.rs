//! What systemd itself does for the daemon: it notices that a part of it stands still, and it keeps what nobody else has when the daemon and soci-mount
//! die together. In the story, and before the kills of the storm.

use super::{
    Next,
    tools::{DAEMON, Guest, HOLDER, PATIENCE, attempt, journal, main_pid, property, replaced, run, shell, within},
};
use crate::{Outcome, ensure};
use std::{fs, path::Path, time::Duration};

const RUNTIME: &str = "/run/soci-snapshotter-grpc";
const DROP_IN: &str = "/etc/systemd/system/soci-snapshotter.service.d/life.conf";
/// What a part may stand still for, the longest that the watchdog of the drop-in waits after it, and an overloaded machine.
const NOTICED: Duration = Duration::from_secs(120);

/// Step of the story.
pub fn watchdog(guest: &Guest) -> Outcome<Next> {
    let reader = guest.reader("app")?;
    a_worker_that_stands_still(&|when| reader.goes_on(when))?;
    Ok(Next::Step)
}

/// Step of the story.
pub fn keepers(guest: &Guest) -> Outcome<Next> {
    let reader = guest.reader("app")?;
    logins_of_both(&|when| reader.goes_on(when))?;
    an_emptied_store(&|when| reader.goes_on(when))?;
    Ok(Next::Step)
}

/// One worker of the daemon's runtime blocks for ever: systemd hears nothing any more, restarts the daemon, and reads go on.
pub fn a_worker_that_stands_still(goes_on: &dyn Fn(&str) -> Outcome) -> Outcome {
    let wedge = format!("{RUNTIME}/wedge");
    write(DROP_IN, &format!("[Service]\nWatchdogSec=5\nEnvironment=SOCI_WEDGE_WORKER={wedge}\n"))?;
    run("systemctl", &["daemon-reload"])?;
    restarted()?;
    let (pid, restarts) = (main_pid(DAEMON)?, property(DAEMON, "NRestarts"));
    write(&wedge, "")?;
    within(NOTICED, "systemd restarts a daemon of which one worker stands still", || {
        (property(DAEMON, "NRestarts") != restarts && main_pid(DAEMON).is_ok_and(|now| now != pid)).then_some(())
    })?;
    goes_on("a worker stood still")?;
    let said = journal(DAEMON, &["-o", "cat"])?;
    ensure!(said.contains("Watchdog timeout"), "systemd does not say why it restarted the daemon: {said}");
    let named = journal(DAEMON, &["-o", "json"])?;
    ensure!(named.contains("of the runtime has stood still for"), "the daemon does not say which worker: {said}");
    fs::remove_file(DROP_IN).map_err(|error| error.to_string())?;
    run("systemctl", &["daemon-reload"])?;
    restarted()?;
    goes_on("the restart")
}

/// A login that came with a CRI pull: the daemon and soci-mount die at once, and only systemd's descriptor store has it.
pub fn logins_of_both(goes_on: &dyn Fn(&str) -> Outcome) -> Outcome {
    let config = "/etc/soci-snapshotter-grpc/config.toml";
    let before = fs::read_to_string(config).map_err(|error| error.to_string())?;
    shell(&format!(
        "sed -i '/^\\[cri_keychain\\]/,/^\\[/ s/^enable_keychain = false/enable_keychain = true/' {config}"
    ))?;
    restarted()?;
    write("/run/cri.py", CRI_PULL)?;
    let asked = run("python3", &["/run/cri.py", &format!("{RUNTIME}/soci-snapshotter-grpc.sock")])?;
    ensure!(asked.contains("answered"), "the image service: {asked}");
    let holder = main_pid(HOLDER)?;
    within(PATIENCE, "soci-mount keeps the login", || {
        shell(&format!("ls -l /proc/{holder}/fd")).ok().filter(|fds| fds.contains("soci-logins"))
    })?;
    let again = || journal(DAEMON, &["-o", "cat"]).map(|said| said.matches("are known again").count());
    let known = again()?;
    let daemon = main_pid(DAEMON)?;
    attempt("sh", &["-c", &format!("kill -9 {daemon} {holder}")])?;
    replaced(HOLDER, holder)?;
    replaced(DAEMON, daemon)?;
    within(PATIENCE, "the login is known again", || (again().ok()? > known).then_some(()))?;
    goes_on("both died")?;
    let disk = shell("grep -rla hush-hush /var/lib/soci-snapshotter-grpc || true")?;
    ensure!(disk.trim().is_empty(), "the login is on disk: {disk}");
    fs::write(config, before).map_err(|error| error.to_string())?;
    restarted()
}

/// Stopping soci-mount empties systemd's store, and ends the holder: the daemon has the connection alone, and hands it to the next holder, which
/// leaves it with systemd again.
pub fn an_emptied_store(goes_on: &dyn Fn(&str) -> Outcome) -> Outcome {
    let stored = || property(HOLDER, "NFileDescriptorStore");
    let handed = || journal(DAEMON, &["-o", "cat"]).map(|said| said.matches("to a new soci-mount").count());
    let before = handed()?;
    run("systemctl", &["stop", HOLDER])?;
    ensure!(stored() == "0", "after systemctl stop systemd still keeps {} descriptors", stored());
    goes_on("soci-mount was stopped")?;
    run("systemctl", &["start", HOLDER])?;
    within(PATIENCE, "the daemon hands the connection in", || (handed().ok()? > before).then_some(()))?;
    within(PATIENCE, "systemd has it again", || (stored() != "0").then_some(()))?;
    let daemon = main_pid(DAEMON)?;
    attempt("sh", &["-c", &format!("kill -9 {daemon}")])?;
    replaced(DAEMON, daemon)?;
    goes_on("the store was emptied, and then the daemon killed")
}

fn restarted() -> Outcome {
    let before = main_pid(DAEMON).unwrap_or(0);
    run("systemctl", &["restart", DAEMON])?;
    replaced(DAEMON, before).map(drop)
}

fn write(path: &str, text: &str) -> Outcome {
    let made = Path::new(path).parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| fs::write(path, text)).map_err(|error| format!("{path}: {error}"))
}

/// PullImage of `nowhere.invalid/private:1` with a user and a password, by hand: HTTP/2 with plain header fields, and two protobuf messages. There is
/// no CRI behind the image service; the login is taken note of as it passes by.
const CRI_PULL: &str = r#"
import socket, struct, sys

def field(number, value):
    return bytes([number << 3 | 2, len(value)]) + value

def header(name, value):
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value

def frame(kind, flags, stream, body):
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

message = field(1, field(1, b"nowhere.invalid/private:1")) + field(2, field(1, b"somebody") + field(2, b"hush-hush"))
headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/runtime.v1.ImageService/PullImage"), (b":authority", b"soci"),
           (b"content-type", b"application/grpc"), (b"te", b"trailers")]
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(60)
connection.connect(sys.argv[1])
connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, b"".join(header(*h) for h in headers)) +
                   frame(0, 1, 1, b"\0" + struct.pack(">I", len(message)) + message))
received = b""
while True:
    while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
        length, kind, stream = int.from_bytes(received[:3], "big"), received[3], int.from_bytes(received[5:9], "big")
        received = received[9 + length:]
        if kind == 1 and stream == 1:
            print("answered")
            sys.exit(0)
    more = connection.recv(65536)
    if not more:
        sys.exit("the connection was closed")
    received += more
"#;
