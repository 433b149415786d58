//! What runs in the suite's images, and how to tell that it is ready: the programs their users would wait for.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Workload {
    pub image: &'static str,
    pub command: &'static [&'static str],
    /// A line that contains one of these says that it is ready.
    pub ready: &'static [&'static str],
}

const NUMPY: &str = "import numpy as np; a=np.arange(1000000).reshape(1000,1000); print('READY',np.__version__,int(a.sum()),flush=True)";
const TENSORFLOW: &str = "import os; os.environ['TF_CPP_MIN_LOG_LEVEL']='3'; import tensorflow as tf; \
    m=tf.keras.Sequential([tf.keras.layers.Dense(10)]); print('READY',tf.__version__,m(tf.ones((1,4))).shape,flush=True)";
const TORCH: &str =
    "import torch; m=torch.nn.Linear(4,2); print('READY',torch.__version__,m(torch.ones(1,4)).shape,flush=True)";
const NGINX: &str =
    "nginx && until (exec 3<>/dev/tcp/127.0.0.1/80) 2>/dev/null; do sleep .02; done; echo READY; sleep 60";
const POSTGRES: &str = "mkdir -p /pg && chown postgres /pg && exec su postgres -c \
    '/usr/lib/postgresql/15/bin/initdb -D /pg >/dev/null && exec /usr/lib/postgresql/15/bin/postgres -D /pg -k /pg -p 7432'";
const RABBITMQ: &str = "echo NODENAME=rabbit@localhost > /etc/rabbitmq/rabbitmq-env.conf; \
    RABBITMQ_LOGS=- RABBITMQ_SERVER_ERL_ARGS='' exec rabbitmq-server";
const FFMPEG: &str = "ffmpeg -loglevel error -f lavfi -i testsrc=duration=0.2 -c:v libx264 -f null - && echo READY";

/// In the order of their size.
pub const SUITE: [Workload; 10] = [
    Workload {
        image: "redis",
        command: &["redis-server", "--save", "", "--port", "7379"],
        ready: &["Ready to accept connections"],
    },
    Workload { image: "nginx", command: &["bash", "-c", NGINX], ready: &["READY"] },
    Workload { image: "numpy", command: &["python3", "-c", NUMPY], ready: &["READY"] },
    Workload { image: "node", command: &["node", "/app/main.js"], ready: &["READY"] },
    Workload { image: "postgres", command: &["sh", "-c", POSTGRES], ready: &["ready to accept connections"] },
    Workload {
        image: "rabbitmq",
        command: &["sh", "-c", RABBITMQ],
        ready: &["Server startup complete", "completed with"],
    },
    Workload { image: "ffmpeg", command: &["sh", "-c", FFMPEG], ready: &["READY"] },
    Workload { image: "tensorflow", command: &["python3", "-c", TENSORFLOW], ready: &["READY"] },
    Workload { image: "torch", command: &["python3", "-c", TORCH], ready: &["READY"] },
    // A layer of more than 10^9 bytes, to be pulled; there is nothing in it to be run.
    Workload { image: "gigabyte", command: &["sh", "-c", "ls /opt; echo READY"], ready: &["READY"] },
];

/// Reads every file of the image.
pub const READ_ALL: &[&str] = &["sh", "-c", "find / -xdev -type f -print0 | xargs -0 cat | sha256sum; echo READY"];

pub fn of(image: &str) -> &'static Workload {
    SUITE.iter().find(|w| w.image == image).unwrap_or_else(|| panic!("no workload for the image '{image}'"))
}

/// A command that has said it is ready.
pub struct Ready {
    pub child: Child,
    /// From its start to the line.
    pub after: Duration,
    /// That line.
    pub line: String,
}

/// Starts `command` and waits for a line that contains one of `ready`; what it said instead if there was none within `patience`.
pub fn until_ready(command: &mut Command, ready: &[&str], patience: Duration) -> Result<Ready, String> {
    let (reader, writer) = std::io::pipe().unwrap();
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().unwrap())
        .stderr(writer)
        .spawn()
        .map_err(|e| e.to_string())?;
    // The command still holds the pipe's other end; replacing both closes it here, or the reader would wait for ever.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (send, lines) = std::sync::mpsc::channel();
    // Reads on after the line, so that the container never waits for us; ends with the command.
    std::thread::spawn(move || {
        for line in BufReader::new(reader).lines().map_while(Result::ok) {
            let _ = send.send(line);
        }
    });
    let mut said = Vec::new();
    loop {
        match lines.recv_timeout(patience.saturating_sub(start.elapsed())) {
            Ok(line) if ready.iter().any(|r| line.contains(r)) => {
                return Ok(Ready { child, after: start.elapsed(), line });
            }
            Ok(line) => said.push(line),
            Err(_) => {
                let _ = child.kill();
                let status = child.wait();
                said.push(format!("not ready after {:.1} s ({status:?})", start.elapsed().as_secs_f64()));
                return Err(said[said.len().saturating_sub(12)..].join("\n"));
            }
        }
    }
}
