//! soci-snapshotter: the containerd snapshotter that starts containers before their images have arrived, and never breaks one
//! afterwards.
//!
//! This page is the architecture. Formats and behaviour towards clients are those of the Go SOCI snapshotter; what is decided here
//! is how we get there, and where we differ, why.
//!
//! # Processes
//!
//! ```text
//!      containerd ──gRPC──┐                                              registry / mirrors
//!           │             ▼                                                     ▲
//!           │   ┌─ soci-snapshotter-grpc ── no capabilities ── no_new_privs ────┴─┐
//!           │   │ grpc ▶ snapshot ▶ daemon::lazy ▶ index ▶ registry               │
//!           │   │                        └▶ layers (store, scheduler) ▶ registry  │
//!           │   │ fs (FUSE session) ─▶ layers                                     │
//!           │   └───▲─────────────────────────────────────────────────────┬───────┘
//!           │       │ /dev/fuse descriptor                                │ SEQPACKET: requests with ids, never paths
//!           │   soci-mount: mounts, answers INIT, drops all,              ▼
//!           │   keeps the descriptor across daemons               soci-custodian: remove tree, usage, owner, publish
//!           │                                                       └ spawner ─fork─▶ a worker per layer: unpack, then end
//!           ▼
//!     overlay lowerdir= ─▶ <root>/snapshotter/snapshots/<id>/fs ─▶ symlink ─▶ <root>/snapshotter/lazy/<id>
//! ```
//!
//! # The three paths a byte takes
//!
//! * **Prepare.** `grpc::service` → `grpc::labels` makes a typed `Target` → `snapshot` records an active snapshot → `daemon::lazy` asks
//!   `index` which SOCI index the image has (the first Prepare fetches it and all its zTOCs, concurrently) → `layers` opens the layer:
//!   flat `toc`, sparse `blob`, presence of `spans` → attributes of implied directories are taken from the layers below →
//!   `fs::Tree` shows it as `lazy/<id>` → `snapshot` commits it under its chain id and containerd is told `ALREADY_EXISTS`.
//!   Every way not to be lazy is an enum variant with a reason, logged once; `snapshot::state::eager` then decides between the next path
//!   and containerd.
//! * **A pull.** `pull::Pulls` learns the image's layers → a job for each that is wanted, all at once, shared by everybody who wants it:
//!   `pull::download` (containerd's content store, or ranges from the registry, in order) → sha256 → inflate → sha256 → a pipe →
//!   `custodian` has a worker make files of it, beside a snapshot's `fs` → both digests right: the Prepare publishes it by a rename and
//!   commits it under its chain id. Compressed bytes touch the disk only where containerd's content store wants them.
//! * **A read in a container.** `fs::session` takes the request off the device → `fs::read` finds the bytes of the file in the layer
//!   → `layers::Layer` finds the span: inflated in memory, compressed on disk, or absent → absent means a demand fetch, ahead of all
//!   other traffic → digest verified, stored, inflated, answered. No FUSE thread waits for the network.
//!
//! # Decisions
//!
//! 1. **One FUSE mount for all layers.** Preparing a layer needs no mount call and no privilege; one descriptor is to be kept alive.
//!    `snapshots/<id>/fs` of a lazy layer is a symlink into it, so mount options stay those of the Go snapshotter.
//! 2. **Every start is a resume.** `soci-mount` holds the descriptor; the daemon rebuilds its state from local files without the
//!    network and goes on serving the same kernel connection. Reads come first: what has a record beside its snapshot is shown before the snapshot
//!    database is opened, which syncs the disk, and before anything else is done (`daemon::recovery`). A layer whose zTOC the
//!    disk has damaged is expected: requests about it wait while that is fetched again, as they would for a span. Requests that the dead
//!    one had taken come again from the kernel (Linux 6.9), or out of a journal that they were read into (`fs::journal`, a memfd that goes wherever the descriptor goes). Inode numbers are a pure function of (snapshot id, position in the
//!    table of contents), and snapshot ids are never reused.
//! 3. **Our own FUSE session instead of fuser's.** The design first said fuser. Its session answers `FUSE_INTERRUPT` with `ENOSYS` (and
//!    the kernel then never asks again, so a killed container would wait for us for ever), reads requests into private buffers
//!    (which rules out the crash journal that kernels before 6.9 need) and hides its request parser, so nothing can be built around
//!    it without copying every reply once more. A read-only filesystem needs two dozen small messages: `fs::wire` has them, parsed
//!    totally. fuser's public vocabulary of flags is used.
//! 4. **The layer store keeps what came over the wire**: compressed spans at their own offsets in a sparse file. A third of the
//!    writes of inflated data, checkable against the layer's digest when complete. Inflated spans live in a small memory cache and,
//!    bounded, in one unlinked scratch file that is page cache in practice: programs touch pages of more spans than memory should
//!    hold, and inflating a span again for every page cost a tensorflow start eight seconds. A thread of the lowest priority fills
//!    it ahead of reads. What containers have read stays in the kernel's own page cache, because the kernel is told that layers
//!    never change.
//! 5. **No fsync in the way of a reader.** A span's presence mark may survive a power cut that its bytes did not. So a span that an
//!    earlier process wrote is checked against its digest on first use, and fetched again when it does not match.
//! 6. **One scheduler owns the network** (`layers::Scheduler`): demand first, unlimited and in several requests at once, so that it
//!    gets most of the link; then what follows what was just read; then everything else, most likely first by a prior over paths
//!    (`layers::prior`). Background requests are sent while fewer bytes are on their way than the link holds, twice that while
//!    nobody has waited for two seconds: the link is not to run dry, and a blocked read is not to wait behind more than that. All layers
//!    of an image stream from its first Prepare on. A layer that is left to containerd gets its share of the link meanwhile.
//! 7. **The daemon holds no capability** after start-up. `soci-custodian` does what needs some, by snapshot id. No read waits for
//!    it: the daemon starts without one, and goes on without one.
//! 8. **A layer is unpacked by a process of its own**, whose root directory is the one it may write to (chroot on every kernel, landlock where there is
//!    one, a short list of system calls, no network). The design has the custodian start workers; it cannot, as it has threads and too few capabilities,
//!    so a process that does nothing but fork is split off first. Directories that a layer only implies get their attributes when it is published, not
//!    when it is unpacked: layers are unpacked at the same time, and those below must be complete to be asked. The custodian asks the ones on disk;
//!    what lazy ones have is sent along by the daemon, so nothing privileged ever waits for FUSE.
//! 9. **Lazy → pulled here → containerd**, decided per layer. A layer of an indexed image that has no zTOC, is below `min_layer_size`, or could not
//!    be made lazy, is pulled here in every configuration: the Go snapshotter does so too. All of them are begun at the image's first
//!    Prepare, when its index is known, and streaming makes way for them. A whole image is pulled here only if it is configured. What fails here
//!    is tried again, then with one plain request, then left to containerd, which has the last word. (The Go daemon lets a failed parallel
//!    pull fail the whole pull, and all pulls of the image.)
//! 10. **A pulled layer has a snapshot number before it has a record.** It is unpacked where it will stay; a crash leaves a directory without record,
//!     which is swept like any other. So containerd 2.2, which prepares the layers of a proxy snapshotter one after another, gets layers
//!     that were unpacked at the same time, without being told of `rebase`.
//! 11. **No content store of our own for compressed layers.** With `content_store.type = "soci"` they are dropped whatever
//!     `discard_unpacked_layers` says, where the Go daemon refuses to start: one key is to be enough to pull eagerly.
//! 12. **The daemon tells how it is on a socket of its own** beside containerd's: one JSON document over HTTP (`daemon::condition`), for `soci
//!     status`, `explain` and `doctor`, and for curl. A method of the gRPC service would have shared that server's limits and its fate.
//! 13. **`soci enable` lets containerd judge**: what it would write is shown to `containerd config dump` beside what is in effect, and taken only
//!     if the one is the other plus what is wanted. Versions of containerd differ in how they merge files; this does not have to know how.
//! 14. **A fat layer is inflated on all cores where that can be done, and nothing has to be believed for it.** A part is decoded ahead of its turn from
//!     where a gzip member or a zstd frame seems to begin, or from a checkpoint; it counts only if the decoder before it ends in the state that the
//!     part began with: place, unused bits, window. What builders make (one member) has no such places at first: then inflating, hashing and
//!     making files overlap, and the checkpoints that are passed are kept as a zinfo (`checkpoints/`, 64 MiB, oldest first out) for the next pull of
//!     the layer: after its image was removed, or above other layers. A lazy layer's zTOC serves as well. They are not given to `soci create`,
//!     which must make the same bytes whoever runs it.
//! 15. **A layer is downloaded once, and unpacked once for each place it has.** Two images with the same layer above different ones share the download
//!     through a file without name, made when the second comes; what had gone by is fetched again. A download that nobody waits for ends within a
//!     second of the cancelled request, two minutes after containerd was last left to pull a layer itself.
//! 16. **One count of requests** (`registry::Throttle`) for pulls and streaming. The operator's limit holds for both; a read that a container waits
//!     for goes through it, and pulls leave it the link while it is on its way.
//! 17. **Containers in user namespaces get layers of their own.** The Prepare of such a container carries id mappings; each layer below it is
//!     shown once more under a number of its own, a lazy one with owners translated in `fs`, an unpacked one copied by a worker of the custodian
//!     (contents shared where the filesystem can). They are shared by all containers with the same mappings and outlive the daemon; the
//!     Go daemon makes them per container and forgets the mappings when it ends. File capabilities are made those of the namespace,
//!     ACLs are shown as they are. Id-mapped mounts would cost nothing, but take a kernel of 5.19 (6.12 for FUSE) and a privileged mount.
//! 18. **What containerd needs to reach a registry is not written down twice.** `[registry] config_path` and `soci --hosts-dir` are by default
//!     `/etc/containerd/certs.d:/etc/docker/certs.d`, as in containerd 2.2. The Go product reads neither; on a node that has none nothing changes,
//!     and where both speak of one registry `config check` says who is heard.
//! 19. **Crates that the design names and that are not used**: tracing-journald gives every field one prefix or none (`telemetry::logs::journal`);
//!     flate2 neither stops at block boundaries nor starts in the middle (`inflate::raw`), flatbuffers lays bytes out differently from the Go builder
//!     (`ztoc::flatbuf`). The last two judge our own in tests.
//! 20. **A complete layer is read back once and compared with everything that is claimed of it** (`layers::examine`): digest, diff ID (the chain
//!     ids of the Prepare say which it is), table of contents. Spans are inflated from their own checkpoints for that, as readers do, so one pass
//!     proves what was shown. At the lowest priority, half of the time, when the link is quiet, one layer at a time: about as much processor time
//!     as indexing the layer takes (some 14 s of one core for a compressed gigabyte, going by `soci convert`). The Go daemon compares none of it.
//!     A wrong index is closed for good; where only an image's configuration is wrong, that
//!     image's snapshot alone (`daemon::served`).
//! 21. **A layer that the power took is pulled again.** Nobody waits for the disk when a layer is committed, here as elsewhere; but its record carries
//!     the boot until the filesystem was synced, a second after pulls come to rest. What a later boot finds marked is in no mount, so its content is
//!     replaced under the same name, by another directory with another number, before anybody sees it (`snapshot::written`). The custodian
//!     syncs: a process that dies in a sync is dead only when the disk has everything, and containers wait for the next daemon.
//!
//! # Who may name whom
//!
//! ```text
//!   words       oci layout notation sync              no I/O; sync: the locks whose interleavings are explored
//!   pure        ztoc inflate tar bolt                 bytes in, values out; no tokio, clock or lock
//!   trust       tls → keychain → registry             only tls names rustls, only keychain and registry name reqwest
//!   read path   registry → index → layers → fs        only fs names fuser; layers and fs name sys for memory that is mapped
//!   pull path   pull                                  names registry, inflate and snapshot; processes and files are the custodian's
//!   control     snapshot grpc daemon config telemetry       only grpc names tonic; toml_edit: config, registry (hosts.toml), cli (containerd's)
//!   privilege   custodian unpack holder sys           unsafe lives in sys (and inflate::raw, the seam to the inflate library)
//!   cli         the soci tool: plain threads over traits for "where blobs are" and "where new ones go" (layouts, containerd, registries);
//!               one runtime in cli::remote waits for containerd (through grpc) and for registries
//! ```
//! `telemetry` is named by all that have something to say to an operator: its catalog gives each message its identity and level. `cli` names
//! `daemon` for one thing: `soci explain` and `soci doctor` ask registries with the daemon's own settings; and `sys` for the allocator's settings.
//! `tests/architecture.rs` keeps it. Where two lines of the table know each other: a `layers::Layer` is `fs::LayerData` and `fs` walks
//! its `layers::toc`; `snapshot` takes its settings in the types of `config`, because a copy of each enum would only be translated.
//!
//! # Invariants
//!
//! * No byte is served that was not covered by a digest of the zTOC, and no zTOC is used whose own digest was not checked.
//! * `ALREADY_EXISTS` is answered only when the committed snapshot is visible and everything to serve it is on local disk.
//! * Everything a peer can grow has a bound, and the constant says where the number comes from.
//! * A start without network serves everything that is here, and what is damaged as soon as there is a network.
//!
//! # Glossary
//!
//! *span*: a piece of a layer that can be fetched, verified and inflated by itself. *zTOC*: table of contents and spans of a layer.
//! *SOCI index*: manifest that lists the zTOCs of an image. *toc*: our flat form of a zTOC's table of contents. *implied directory*: one
//! that a layer's paths need but the layer does not list. *holder*: `soci-mount` after it has mounted. *lazy*: served through FUSE
//! while it arrives.

pub mod bolt;
pub mod cli;
pub mod config;
pub mod custodian;
pub mod daemon;
pub mod fs;
pub mod grpc;
pub mod holder;
pub mod index;
pub mod inflate;
pub mod keychain;
pub mod layers;
pub mod layout;
pub mod notation;
pub mod oci;
pub mod pull;
pub mod registry;
pub mod snapshot;
mod sync;
pub mod sys;
pub mod tar;
pub mod telemetry;
pub mod tls;
pub mod unpack;
pub mod ztoc;
