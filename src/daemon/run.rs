//! The daemon's life, in order.

use super::{
    artifacts::Artifacts,
    collect,
    condition::{Cause, Condition, Identity, Reporter},
    eager, keeping,
    lazy::{self, LazyMounts, LazySettings},
    listen::{self, ListenError, Listening},
    observe::{Observers, OperationLog},
    record, recovery, registries, reload,
    root::{self, RootError},
    settings::{self, Chosen},
    systemd::{self, Note},
    takeover, watchdog,
};
use crate::{
    config::{
        self, Config,
        args::{Invocation, LogLevel, Options, Strictness},
    },
    custodian, fs as lazyfs,
    grpc::{self, content::ContainerdContent},
    holder::{self, Held, How},
    index::{self, ContentStore, DiscoverySettings, Indexes},
    keychain::{CriLogins, Keychain},
    layers::{
        Ahead, InflatedCache, LayerStore, Pace, Persistence, QuotaSettings, Scheduler, Scratch, Settings, Shared, Spill,
    },
    layout::Layout,
    pull::{self, Pulls},
    registry::{self, Registry},
    snapshot::{self, Door, Snapshotter},
    sys,
    telemetry::{
        catalog::say,
        http,
        logs::{self, Level, Output},
        metrics::Metrics,
    },
    ztoc::Limits,
};
use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};
use tokio::signal::unix::{SignalKind, signal};

/// How long reads under way may take after SIGTERM, and before them gRPC requests. Users of the Go daemon give it five seconds in all
/// (I-RN11); what is not answered by then is the next daemon's, or containerd's to repeat.
const DRAIN: Duration = Duration::from_millis(2500);
/// See [`DRAIN`].
const LAST_REQUESTS: Duration = Duration::from_millis(1500);
/// See [`DRAIN`]. Reads are answered meanwhile.
const LAST_WRITES: Duration = Duration::from_millis(900);

/// How long the custodian may take to say hello before the daemon goes on without one: a start that fails because of it fails within this time.
const FIRST_GREETING: Duration = Duration::from_secs(5);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("pull_modes.parallel_pull_unpack.decompress_streams")]
    Decompressor(#[from] pull::ProgramError),
    #[error("cannot use the content store")]
    Content(#[from] index::StoreError),
    #[error("cannot get the FUSE mount: start the daemon as root, or soci-mount with the same --root before it")]
    Holder(#[from] holder::HolderError),
    #[error("cannot get the custodian, which acts on containers' files for us")]
    Custodian(#[source] io::Error),
    #[error("cannot give up privileges")]
    Confine(#[source] io::Error),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot set up registry access")]
    Registry(#[from] registry::RegistryError),
    #[error("cannot open the snapshot records")]
    Snapshots(#[from] snapshot::StoreError),
    #[error("cannot serve the FUSE mount")]
    Fuse(#[source] io::Error),
    #[error("cannot serve {address}")]
    Serve { address: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot serve {what} on {address:?}: change {key} in the configuration")]
    Endpoint {
        what: &'static str,
        key: &'static str,
        address: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// Entry point of `soci-snapshotter-grpc`.
pub fn main() -> ExitCode {
    match config::args::parse(std::env::args_os(), &|name| std::env::var_os(name)) {
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        Ok(Invocation::Print(text)) => print(&text),
        Ok(Invocation::ConfigDefault) => print(&config::documented(&Config::default())),
        Ok(Invocation::ConfigDump(options)) => match config::load(&options.config) {
            Ok(loaded) => print(&config::render(&loaded.config)),
            Err(error) => refuse(&error),
        },
        Ok(Invocation::ConfigCheck { options, strictness }) => check(&options, strictness),
        Ok(Invocation::Run(options)) => start(options),
    }
}

fn print(text: &str) -> ExitCode {
    use std::io::Write;
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn refuse(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("{}: {}", config::args::PROGRAM, snapshot::chain(error));
    ExitCode::FAILURE
}

fn check(options: &Options, strictness: Strictness) -> ExitCode {
    let loaded = match config::load(&options.config) {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error),
    };
    for line in loaded.warning_lines() {
        eprintln!("warning: {line}");
    }
    let registries = match registries::check(&loaded.config, options) {
        Ok(registries) => registries,
        Err(problem) => return refuse(&problem),
    };
    let ok = format!("{}: ok\n", options.config.display());
    match strictness {
        Strictness::Lenient => print(&(registries.text + &ok)),
        Strictness::Strict if registries.warnings > 0 => {
            eprintln!("{}: {} warnings about registries", config::args::PROGRAM, registries.warnings);
            ExitCode::FAILURE
        }
        Strictness::Strict => match loaded.strict() {
            Ok(_) => print(&(registries.text + &ok)),
            Err(error) => refuse(&error),
        },
    }
}

fn start(options: Options) -> ExitCode {
    let began = Instant::now();
    if let Err(error) = logs::init(level(options.log_level), Output::Automatic) {
        eprintln!("{}: failed to prepare logger: {error}", config::args::PROGRAM);
        return ExitCode::FAILURE;
    }
    let (version, revision) = config::args::version();
    tracing::info!(version, revision, "starting soci-snapshotter-grpc");
    let layout = match absolute(&options.root) {
        Ok(root) => Layout::new(root),
        Err(error) => {
            logs::fatal("failed to serve snapshotter", &error);
            return ExitCode::FAILURE;
        }
    };
    let chosen = match settings::choose(&options.config, &options.address, &layout) {
        Ok(chosen) => chosen,
        Err(error) => {
            logs::fatal(&snapshot::chain(&error), &error);
            return failed_start(&error);
        }
    };
    for warning in &chosen.warnings {
        say!(ConfigDoubtful, "{warning}");
    }
    match run(&options, layout, &chosen, began) {
        Ok(()) => {
            tracing::info!("Exiting");
            ExitCode::SUCCESS
        }
        Err(error) => {
            logs::fatal("failed to serve snapshotter", &error);
            failed_start(&error)
        }
    }
}

/// systemd tries again at once: the status line says why, and there is time to read it.
fn failed_start(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    if systemd::listens() {
        systemd::status(&format!("NOT RUNNING: {}", snapshot::chain(error).replace(['\n', '\r'], " ")));
        std::thread::sleep(systemd::FAILED_START_PAUSE);
    }
    ExitCode::FAILURE
}

/// Everything that needs privilege or must happen before there are threads; then the rest of the daemon's life.
fn run(options: &Options, layout: Layout, chosen: &Chosen, began: Instant) -> Result<(), StartError> {
    sys::process::tame_allocator();
    let config = &chosen.config;
    // What is wrong with the configuration is said before anything is started.
    let pulling = eager::settings(config)?;
    let _claim = root::claim(&layout)?;
    if config.skip_check_snapshotter_supported {
        // The operator asked for it; the text and level are the Go snapshotter's.
        tracing::warn!("skipped snapshotter is supported check");
    } else if !record::all(&layout).is_empty() {
        // Containers wait, and live on it.
        tracing::debug!("whether overlay filesystems can live below the root directory was tried before");
    } else if root::check_overlay(&layout)? == root::Checked::MayNotMount {
        tracing::debug!(
            "whether overlay filesystems can live below the root directory cannot be tried without CAP_SYS_ADMIN"
        );
    }
    raise_descriptor_limit();
    // Before the mount, which would stay: containerd may connect now, and is answered when everything is here.
    let listening = listen::listen(&options.address)?;
    let how = holder_from()?;
    let held = holder::obtain(&layout, how)?;
    let custodian = custodian::start(&layout);
    let alone = sys::process::SingleThread::prove().map_err(StartError::Confine)?;
    sys::drop_all_capabilities().map_err(StartError::Confine)?;
    sys::seccomp::confine(sys::seccomp::Role::Daemon, &alone).map_err(StartError::Confine)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("soci")
        // What blocks is disk and inflating: more threads than this only compete for the processor.
        .max_blocking_threads(32)
        .build()
        .map_err(StartError::Runtime)?;
    let parts = Received { began, held, how, custodian, listening };
    let result = runtime.block_on(serve(layout, chosen, options, pulling, parts));
    // Inflating that nobody waits for any more need not be waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// What the start collected while it had its powers.
struct Received {
    /// When the program was started.
    began: Instant,
    held: Held,
    how: How,
    custodian: custodian::Connection,
    listening: Listening,
}

/// A unit that took the power to mount away from us runs `soci-mount` in another one.
fn holder_from() -> Result<How, StartError> {
    let may_mount = sys::capabilities::may_mount().map_err(StartError::Confine)?;
    Ok(if systemd::listens() && !may_mount { How::Connect } else { How::SpawnChild })
}

fn absolute(path: &Path) -> Result<PathBuf, RootError> {
    std::path::absolute(path).map_err(|source| RootError::Prepare { path: path.to_owned(), source })
}

/// As many open files as the system lets us have: each lazy layer takes two or three, and shells give programs 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        say!(FewDescriptors, %error, limit = ?current, "cannot raise the limit of open files: some hundred lazy layers may be too many");
    }
}

async fn serve(
    layout: Layout,
    chosen: &Chosen,
    options: &Options,
    pulling: pull::Settings,
    Received { began, held, how, custodian, listening }: Received,
) -> Result<(), StartError> {
    let config = &chosen.config;
    let hangup = signal(SignalKind::hangup()).map_err(StartError::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    let metrics = Metrics::new();
    let observers = Observers::new(metrics.clone(), OperationLog::of(config), config.fuse_metrics_emit_wait);
    let disk = Arc::new(custodian::Client::new(custodian));
    let tree = Arc::new(lazyfs::Tree::new(lazyfs::OpaqueMark::Trusted, observers.clone()));
    let cri_logins = config.cri_keychain.enable_keychain.then(Arc::<CriLogins>::default);
    if let Some(logins) = &cri_logins {
        keeping::inherit_logins(&layout, logins);
        tokio::spawn(keeping::keep_logins(layout.clone(), logins.clone()));
    }
    let unpacker = Arc::new(eager::Custodian::new(disk.clone(), layout.clone()));
    let parts = Parts { tree: tree.clone(), observers: observers.clone(), unpacker: unpacker.clone() };
    let lazy = Arc::new(lazy_side(&layout, config, pulling, parts, cri_logins.clone())?);
    unpacker.show(&lazy);
    // Containers wait for this; nobody for what follows.
    let shown = recovery::show(&lazy).await;
    let connection = if held.first { lazyfs::Connection::First } else { lazyfs::Connection::Resumed };
    let journal = keeping::journal(held.journal.as_ref(), &held.init);
    let patience = scheduling(config).budget;
    let session_options = lazyfs::SessionOptions { connection, journal, patience, ..lazyfs::SessionOptions::default() };
    let device = held.device.try_clone().map_err(StartError::Fuse)?;
    let session = lazyfs::Session::start(device, held.init, tree, tokio::runtime::Handle::current(), session_options)
        .map_err(StartError::Fuse)?;
    if let Some(mut condemned) = observers.condemnations() {
        let kernel = session.kernel();
        tokio::spawn(async move {
            while let Some(id) = condemned.recv().await {
                let kernel = kernel.clone();
                let _ = tokio::task::spawn_blocking(move || kernel.forget_content(id)).await;
            }
        });
    }
    tracing::info!(milliseconds = began.elapsed().as_millis().to_string(), "reads are answered");
    if !shown.anything()
        && let Ok(greeted) = tokio::time::timeout(FIRST_GREETING, disk.greeted()).await
    {
        // An installation that lacks a part is noticed now, and not when containers depend on it.
        greeted.map_err(StartError::Custodian)?;
    }
    let scheduler = lazy.store.shared().scheduler.clone();
    tokio::spawn(scheduler.clone().run());
    let progress = {
        let (observers, scheduler) = (observers.clone(), scheduler.clone());
        move || observers.progress(scheduler.background())
    };
    watchdog::start(tokio::runtime::Handle::current(), session.pulse(), {
        let progress = progress.clone();
        move || {
            let _ = progress();
        }
    });
    let door = Door::closed();
    let condition = Condition::starting(door.clone());
    if let Some(trouble) = &chosen.trouble {
        condition.trouble(Cause::Config, trouble.clone());
    }
    condition.watch_room(layout.root().to_owned());
    let reporter = Reporter {
        identity: Identity {
            address: listening.address.clone(),
            root: layout.root().to_owned(),
            config: options.config.clone(),
        },
        condition: condition.clone(),
        observers: observers.clone(),
        scheduler: scheduler.clone(),
    };
    reporter.serve(&listening.path()).await;
    let snapshots = snapshot::Options {
        boot: systemd::boot(),
        layer_of: grpc::labels::unpacked,
        ..snapshot::Options::new(layout.clone(), config.into())
    };
    let open = {
        let (pulls, lazy, disk) = (lazy.pulls.clone(), lazy.clone(), disk.clone());
        move || {
            let layers = Arc::new(lazy.clone());
            let opening = Snapshotter::open(snapshots.clone(), layers, Arc::new(pulls.clone()), disk.clone());
            let pulls = pulls.clone();
            async move {
                let snapshotter = opening.await?;
                pulls.open(snapshotter.places());
                Ok(snapshotter)
            }
        }
    };
    match open().await {
        Ok(snapshotter) => {
            tracing::debug!(milliseconds = began.elapsed().as_millis().to_string(), "the snapshot records are open");
            let all_shown = shown.tell(Some(&takeover::adopt(&snapshotter, &lazy)?));
            // What waits may still find its layer in the store.
            if all_shown && lazy.state.waiting.is_empty() {
                recovery::sweep(&lazy).await;
            }
            door.open(snapshotter);
        }
        // Containers read these, whatever else is wrong.
        Err(error) if shown.anything() => {
            shown.tell(None);
            let lazy_later = lazy.clone();
            condition.open_later(&error, move || {
                let (opening, lazy) = (open(), lazy_later.clone());
                async move {
                    let snapshotter = opening.await?;
                    takeover::adopt(&snapshotter, &lazy)?;
                    Ok(snapshotter)
                }
            });
        }
        Err(error) => return Err(error.into()),
    }
    tokio::spawn({
        let lazy = lazy.clone();
        async move { lazy.find_local_copies().await }
    });
    tokio::spawn(collect::run(lazy.clone()));
    if !config.background_fetch.disable {
        metrics.background_fetch_enabled();
    }
    tokio::spawn(report_queue(metrics.clone(), scheduler.clone(), config.background_fetch.emit_metric_period));
    match serve_telemetry(config, metrics.clone()).await {
        // An address that is taken is no reason to leave containers alone.
        Err(error) if shown.anything() => condition.trouble(Cause::Config, snapshot::chain(&error)),
        served => served?,
    }
    tokio::spawn(keeping::keep_held(layout.clone(), held, how, condition.clone(), cri_logins.clone()));
    tokio::spawn(keeping::keep_custodian(disk, door.clone()));
    let Listening { listener, address } = listening;
    let failed =
        |source: Box<dyn std::error::Error + Send + Sync>| StartError::Serve { address: address.clone(), source };
    listener.set_nonblocking(true).map_err(|e| failed(e.into()))?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(|e| failed(e.into()))?;
    condition.answers();
    if condition.refusal().is_none() {
        settings::keep(&layout, config);
    }
    let note = Note::default();
    let line = {
        let condition = condition.clone();
        move || match condition.refusal() {
            Some(why) => format!("TAKES NOTHING NEW: {why}; {}", progress()),
            None => progress().to_string(),
        }
    };
    tokio::spawn(systemd::show_status(line, note.clone()));
    let live = reload::Parts { layout: layout.clone(), lazy, observers, metrics, condition };
    tokio::spawn(reload::on_hangup(hangup, options.config.clone(), config.clone(), live, note));
    systemd::ready();
    say!(Started, address, "soci-snapshotter-grpc successfully started");
    let images = cri_logins.map(|logins| {
        let path = &config.cri_keychain.image_service_path;
        tracing::info!(path, "CRI's image service is passed on");
        grpc::CriImages::new(path, logins)
    });
    let told = tokio::sync::Notify::new();
    let records = door.clone();
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("Got terminated"),
            _ = interrupt.recv() => tracing::info!("Got interrupt"),
        }
        systemd::stopping();
        told.notify_one();
    };
    let patience = async {
        told.notified().await;
        tokio::time::sleep(LAST_REQUESTS).await;
    };
    tokio::select! {
        served = grpc::serve(listener, door, images, grpc::Limits::default(), stop) => served.map_err(|e| failed(e.into()))?,
        () = patience => tracing::info!("gRPC requests that take long are cut off; containerd repeats them"),
    }
    // The machine may be about to go down. What is not on disk by then is pulled again after it is up.
    if let Ok(snapshotter) = records.enter() {
        let _ = tokio::time::timeout(LAST_WRITES, snapshotter.settle()).await;
    }
    let drained = tokio::task::spawn_blocking(move || session.stop(DRAIN)).await;
    if let Ok(lazyfs::Drained { unanswered }) = drained
        && unanswered > 0
    {
        tracing::info!(unanswered = unanswered.to_string(), "reads that still wait are left to the next daemon");
    }
    Ok(())
}

/// What the lazy and the eager side stand on.
struct Parts {
    tree: Arc<lazyfs::Tree>,
    observers: Arc<Observers>,
    unpacker: Arc<dyn pull::Unpacker>,
}

fn lazy_side(
    layout: &Layout,
    config: &Config,
    pulling: pull::Settings,
    parts: Parts,
    cri_logins: Option<Arc<CriLogins>>,
) -> Result<LazyMounts, StartError> {
    let Parts { tree, observers, unpacker } = parts;
    let keychain = Arc::new(Keychain::new(registries::keychain_sources(config, cri_logins)));
    let throttle = registry::Throttle::new(pulling.downloads);
    let exchanges = eager::Exchanges { observers: observers.clone(), throttle: throttle.clone() };
    let registry = Registry::observed(
        registries::http_settings(config),
        registries::hosts(config),
        keychain,
        Arc::new(exchanges),
    )?;
    let store = ContentStore::soci(layout)?;
    let containerd = ContainerdContent::new(config.content_store.containerd_address.clone());
    let artifacts = Artifacts::new(containerd.clone(), store.clone());
    let indexes = Indexes::observed(registry.clone(), store, discovery(config), observers.clone());
    let shared = Shared::new(
        InflatedCache::new(config.layer_store.cache_memory_bytes),
        Scheduler::new(scheduling(config), throttle.clone()),
        tokio::runtime::Handle::current(),
        observers.clone(),
    );
    let shared = Arc::new(match spill(layout) {
        Ok(spill) => shared.spilling(spill),
        Err(error) => {
            say!(NoScratch, root = %layout.root().display(), %error, "no scratch file; layers are inflated again when memory runs short");
            shared
        }
    });
    let parts = pull::Parts {
        registry: registry.clone(),
        contents: Arc::new(eager::Content(containerd.clone())),
        unpacker,
        observer: Arc::new(eager::Told { scheduler: shared.scheduler.clone(), observers: observers.clone() }),
        throttle,
        shelf: pull::Shelf::open(layout.checkpoints(), eager::indexed(layout.clone())),
        scratch: layout.root().to_owned(),
    };
    Ok(LazyMounts {
        layout: layout.clone(),
        registry,
        indexes,
        containerd,
        artifacts,
        asks_containerd: config.content_store.kind == config::ContentStoreType::Containerd,
        store: Arc::new(LayerStore::new(layout.clone(), shared, Limits::default())),
        tree,
        observers,
        pulls: Pulls::new(pulling, parts),
        settings: RwLock::new(lazy_settings(config)),
        state: lazy::State::default(),
    })
}

/// Which ways of finding an index are on under `config`.
pub fn discovery(config: &Config) -> DiscoverySettings {
    DiscoverySettings {
        v1: config.pull_modes.soci_v1.enable,
        v2: config.pull_modes.soci_v2.enable,
        prefetch: config.prefetch.enable,
        ..DiscoverySettings::default()
    }
}

pub(super) fn lazy_settings(config: &Config) -> LazySettings {
    let headers = match config.disable_verification {
        true => lazyfs::HeaderCheck::Skipped,
        false => lazyfs::HeaderCheck::Required,
    };
    LazySettings { headers, mount_timeout: config.mount_timeout.duration() }
}

pub(super) fn scheduling(config: &Config) -> Settings {
    let (background, blob) = (&config.background_fetch, &config.blob);
    let pace = match (background.disable, background.pace) {
        (true, _) => Pace::Off,
        (false, config::Pace::LineRate) => Pace::LineRate,
        (false, config::Pace::Every(period)) => Pace::Every {
            period,
            silence: match background.silence {
                config::Silence::None => Duration::ZERO,
                config::Silence::For(silence) => silence,
            },
        },
    };
    Settings {
        pace,
        max_bytes_per_sec: match background.max_bytes_per_sec {
            config::Limit::Unlimited => None,
            config::Limit::At(bytes) => Some(bytes),
        },
        retries: blob.max_retries,
        persistence: match blob.max_retries == config::Blob::default().max_retries {
            true => Persistence::WholeBudget,
            false => Persistence::Retries,
        },
        min_wait: blob.min_wait,
        max_wait: blob.max_wait,
        budget: blob.fetching_timeout.duration().unwrap_or(Duration::from_secs(24 * 3600)),
        verification_retries: match blob.max_span_verification_retries {
            0 => blob.max_retries,
            retries => retries,
        },
        quota: match config.layer_store.max_size {
            config::Limit::Unlimited => QuotaSettings::UNLIMITED,
            config::Limit::At(bytes) => {
                QuotaSettings::of(bytes, config.layer_store.high_water, config.layer_store.low_water)
            }
        },
    }
}

fn level(level: LogLevel) -> Level {
    match level {
        LogLevel::Panic => Level::Panic,
        LogLevel::Fatal => Level::Fatal,
        LogLevel::Error => Level::Error,
        LogLevel::Warn => Level::Warning,
        LogLevel::Info => Level::Info,
        LogLevel::Debug => Level::Debug,
        LogLevel::Trace => Level::Trace,
    }
}

/// Metrics and the debug endpoint, where they are asked for.
async fn serve_telemetry(config: &Config, metrics: Metrics) -> Result<(), StartError> {
    let network = match config.metrics_network {
        config::Network::Tcp => "tcp",
        config::Network::Tcp4 => "tcp4",
        config::Network::Tcp6 => "tcp6",
        config::Network::Unix => "unix",
    };
    let mut endpoints = Vec::new();
    if !config.metrics_address.is_empty() && !config.no_prometheus {
        endpoints.push((
            "metrics",
            "metrics_address",
            network,
            &config.metrics_address,
            http::Content::Metrics(metrics),
        ));
    }
    if !config.debug_address.is_empty() {
        endpoints.push(("the debug listener", "debug_address", "tcp", &config.debug_address, http::Content::Debug));
    }
    for (what, key, network, address, content) in endpoints {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| StartError::Endpoint {
            what,
            key,
            address: address.clone(),
            source,
        };
        let endpoint = http::Endpoint::new(network, address).map_err(|e| failed(e.into()))?;
        let listener = endpoint.bind().await.map_err(|e| failed(e.into()))?;
        tokio::spawn(http::serve(listener, content));
    }
    Ok(())
}

async fn report_queue(metrics: Metrics, scheduler: Scheduler, period: Duration) {
    loop {
        metrics.set_background_queue(scheduler.queue_length() as u64);
        tokio::time::sleep(period.max(Duration::from_millis(100))).await;
    }
}

/// The second level behind the memory cache. Some filesystems have no unnamed files.
fn spill(layout: &Layout) -> io::Result<Spill> {
    Ok(Spill { scratch: Scratch::create(layout.root(), scratch_bytes())?, ahead: Ahead::start()? })
}

/// Room for inflated spans on disk, which is page cache while it is fresh: an eighth of the memory, within reason.
fn scratch_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let memory = info.totalram.saturating_mul(u64::from(info.mem_unit));
    (memory / 8).clamp(64 << 20, 1 << 30)
}
