//! The messages that an operator may have to act on: one table of identities, levels and explanations.
//!
//! A message is said with [`say!`](super::say): the table gives its level and its `MESSAGE_ID`, the place that says it gives the fields and the
//! words. From the same table comes the journal catalog ([`file`], installed as `soci-snapshotter.catalog`), so that `journalctl -x` explains
//! each of them: what happened, what it means for containers, what to do.
//!
//! * An identity is for ever: scripts and alerts match on it. A message that means something else gets a new one.
//! * Explanations may name fields as `@SOCI_LAYER@`; journald puts the values in. A test sees to it that every place that says the message
//!   gives those fields.
//! * Warnings and errors are only said through this table (`tests/journal.rs` keeps it).

use tracing::Level;

/// How often the journal gets a message that scripts expect once for each layer. On stderr (JSON lines) every one is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    Always,
    /// Once for each image (and reason): forty layers that became lazy are one fact.
    OncePerImage,
}

/// One row of the table.
#[derive(Debug)]
pub struct Entry {
    /// 128 bits in hexadecimal, lower case.
    pub id: &'static str,
    pub level: Level,
    pub journal: Journal,
    pub subject: &'static str,
    pub happened: &'static str,
    /// What it means for containers.
    pub means: &'static str,
    /// What to do. May have lines of its own, for commands.
    pub act: &'static str,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $id:literal $level:ident $journal:ident $subject:literal
        happened $happened:literal means $means:literal act $act:literal;)+) => {
        /// Every message of the catalog.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Message { $($(#[$doc])* $name),+ }

        impl Message {
            pub const ALL: &'static [Message] = &[$(Message::$name),+];

            /// As the source calls it.
            pub const fn name(self) -> &'static str {
                match self { $(Message::$name => stringify!($name)),+ }
            }

            pub const fn entry(self) -> &'static Entry {
                match self {
                    $(Message::$name => &Entry {
                        id: $id, level: Level::$level, journal: Journal::$journal, subject: $subject,
                        happened: $happened, means: $means, act: $act,
                    }),+
                }
            }
        }
    };
}

messages! {
    Started = "bf979cc2d4494bf79d66f08489b7d07b" INFO Always "The SOCI snapshotter is ready"
        happened "The daemon has recovered the lazily loaded layers of this node and answers containerd on @SOCI_ADDRESS@."
        means "Images can be pulled and containers started."
        act "Nothing. soci status shows what is mounted.";
    /// Said at level fatal.
    CannotStart = "650073dd777e49b9ae6a80b9ffcf4cff" ERROR Always "The SOCI snapshotter cannot start"
        happened "The daemon ended during its start: @SOCI_ERROR@."
        means "Images cannot be pulled and containers not started with this snapshotter. Containers that run keep what they have read; reads of \
               what is not here yet wait until a daemon is back."
        act "Correct what the message names and start it again:\n\
             \n    soci-snapshotter-grpc config check\n    systemctl restart soci-snapshotter\n\nsoci doctor looks for other causes.";
    Degraded = "3439e65decf849eb9b897ae3442e8bed" ERROR Always "The SOCI snapshotter runs, but takes nothing new"
        happened "The daemon could not start properly: @SOCI_ERROR@. It goes on with what it has (@SOCI_REASON@)."
        means "Containers that run keep reading their layers, also what has still to be fetched. New Prepares are refused with this reason: no \
               image can be pulled and no container started with this snapshotter."
        act "Correct what the message names. With a bad configuration:\n\
             \n    soci-snapshotter-grpc config check\n    systemctl restart soci-snapshotter\n\n\
             A full disk or a snapshot database that could not be opened is tried again every few seconds. soci status says when it is over.";
    DegradedOver = "0a9a4ecf44834dbc9d5756eda86cbf29" INFO Always "The SOCI snapshotter works again"
        happened "What kept the daemon from starting properly is gone; the snapshot records are open."
        means "Images can be pulled and containers started again."
        act "Nothing.";
    ConfigDoubtful = "407b0949c4894a2b8e7ba5ff57daa394" WARN Always "A setting of the SOCI snapshotter is not as it should be"
        happened "The configuration file has something that is ignored or deprecated; the message names file, line and key."
        means "The daemon runs with its default where a key is unknown. A misspelt key is a setting that is not in effect."
        act "Correct the file. All such places:\n\n    soci-snapshotter-grpc config check --strict";
    ConfigReloaded = "e1de716c8ec04c7ab23978249775062f" INFO Always "The SOCI snapshotter has read its configuration again"
        happened "The settings @SOCI_APPLIED@ changed and are in effect."
        means "Nothing changes for containers that run. Layers that are mounted already keep the mirrors and time-outs they began with."
        act "Nothing.";
    ConfigNotReloaded = "02e807c48ebb4930b0f16a87e59970e1" ERROR Always "The SOCI snapshotter has refused a changed configuration"
        happened "The configuration was to be read again and cannot be used: @SOCI_ERROR@. Nothing of it was applied."
        means "Nothing changes: the daemon goes on with the settings it had. A start with this file would fail, or take nothing new."
        act "Correct what the message names and reload again:\n\n    soci-snapshotter-grpc config check\n    systemctl reload soci-snapshotter";
    ConfigNeedsRestart = "6732e55e229a4a958afb5d572d11f54a" WARN Always "Settings of the SOCI snapshotter wait for a restart"
        happened "The configuration was read again. The settings @SOCI_KEYS@ cannot change while the daemon runs and are as they were."
        means "Nothing until the restart, which containers survive: their reads wait for a moment."
        act "systemctl restart soci-snapshotter";
    LayerLazy = "c41df71244bd42ef97efe5c17cd43810" INFO OncePerImage "An image is loaded lazily"
        happened "Layer @SOCI_LAYER@ of @SOCI_IMAGE@ was mounted without being downloaded first. The journal has this line once for each image; \
                  other layers of it follow silently."
        means "Containers of this image can start now; what they read is fetched when they read it, the rest in the background."
        act "Nothing. soci status shows how much is here.";
    LayerPulled = "c8ff5514e78c441994a4d8baa6d983ac" INFO OncePerImage "Layers of an image were pulled by the snapshotter"
        happened "Layer @SOCI_LAYER@ of @SOCI_IMAGE@ was pulled and unpacked by the snapshotter, or was here already. The journal has this line once \
                  for each image."
        means "The image starts like any other image that is on disk."
        act "Nothing. soci explain @SOCI_IMAGE@ says for each layer what was done, and why.";
    LayerNotLazy = "6985b004d35c4140af1068936099adb2" WARN OncePerImage "An image could not be loaded lazily"
        happened "Layer @SOCI_LAYER@ of @SOCI_IMAGE@ cannot be loaded lazily (@SOCI_REASON@): @SOCI_ERROR@. The journal has this line once for each \
                  image and reason."
        means "The layer is pulled as a whole before containers start. They work; starting takes as long as without this snapshotter."
        act "If the image is meant to be lazy, give it a SOCI index (soci convert) and push that to the same repository. Which layers, and why:\n\
             \n    soci explain @SOCI_IMAGE@\n\nReason no-index for every image of a registry often means that it needs a login: soci doctor @SOCI_IMAGE@";
    NoIndex = "6050066469b54a95b7017d73cc7e099e" WARN OncePerImage "An image has no SOCI index"
        happened "No SOCI index was found for @SOCI_IMAGE@, so its layers are left to containerd."
        means "The image is pulled and unpacked as without this snapshotter."
        act "Nothing, if the image is not meant to be lazy. Otherwise: soci explain @SOCI_IMAGE@";
    LeftToContainerd = "38b2b73bf4b4440790678b2c95527b23" WARN OncePerImage "Layers of an image are left to containerd"
        happened "The snapshotter cannot provide layer @SOCI_LAYER@ of @SOCI_IMAGE@ itself (@SOCI_REASON@): @SOCI_ERROR@."
        means "containerd downloads and unpacks the layer. Containers work; starting takes longer."
        act "soci explain @SOCI_IMAGE@ says for each layer what was decided, and why.";
    LayerNotKept = "5d0a8b3c6f1e4a7c9b2f48d1e06a3c57" WARN Always "A layer could not be put into containerd's content store"
        happened "Layer @SOCI_LAYER@ was pulled here, but containerd did not take its compressed form: @SOCI_ERROR@."
        means "Nothing; the layer itself is here. Something that reads images out of containerd (ctr images export, say) will not find the layer."
        act "See whether containerd has room and answers on its socket ([content_store] containerd_address):\n\
             \n    ctr content ls\n\nWith discard_unpacked_layers = true nothing is put there.";
    ReadFailed = "33dcc957cd52462a94ed25979d974d2d" ERROR Always "A container got an I/O error"
        happened "File @SOCI_PATH@ in layer @SOCI_LAYER@ of @SOCI_IMAGE@ could not be read: @SOCI_ERROR@. Every way to get the bytes was tried until \
                  the time for it was up ([blob] fetching_timeout_sec)."
        means "The program that read the file got EIO. The next read tries again."
        act "See whether the registry is reachable and lets this node in:\n\n    soci doctor @SOCI_IMAGE@\n\nAn image that was deleted from its registry \
             before all of it was here cannot be completed: push it again or run another one.";
    LayerContradictsIndex = "60ab0bda3a004a908f47f38c57e5e1d3" ERROR Always "A SOCI index is wrong: the layer is not what its index says"
        happened "All of layer @SOCI_LAYER@ of @SOCI_IMAGE@ is here. It was compared with its digest, its diff ID and its table of contents, and is not \
                  what was shown: @SOCI_ERROR@."
        means "The index (or the image's configuration) was made from other data than the layer, by mistake or on purpose. Containers of this image \
               may have read content that is not the image's. From now on their reads of this layer end with EIO and no container can be started \
               from it; also after a restart. When the image is pulled again, the layer is pulled as a whole."
        act "Treat it as an incident: find out who made and pushed the index, stop containers of the image, remove the image here and pull it again. \
             Rebuild the index from the image (soci convert) and push it. What is remembered of the wrong one is a file below layers/condemned in the \
             snapshotter's root directory.";
    BadBytes = "439d3ba22d044362897c528876f7ab11" WARN Always "A registry or mirror sent wrong bytes"
        happened "Span @SOCI_SPAN@ of layer @SOCI_LAYER@, as fetched from @SOCI_HOST@, does not match its digest."
        means "Nothing, if another host or another attempt has the right bytes: wrong ones are never shown to a container."
        act "If it goes on, look at that host: a mirror with a damaged blob must be told to fetch it again.";
    SpanDamaged = "a3c00bdc68d44101ad9e15a2fd3a748f" WARN Always "Fetched data was damaged on disk"
        happened "Span @SOCI_SPAN@ of layer @SOCI_LAYER@ was on disk, but does not match its digest any more."
        means "It is fetched again. After a power failure this is expected: data is not forced to disk in the way of readers."
        act "Without a power failure before it, have the disk checked.";
    LayerDirectoryDamaged = "04a91b3a4511451ea443a556e0624a2f" WARN Always "The files of a layer were damaged and are made again"
        happened "The directory of layer @SOCI_LAYER@ in the layer store could not be used as it was."
        means "What had been fetched of the layer is fetched again when it is read."
        act "Without a power failure before it, have the disk checked.";
    LayerUnreadable = "8988680986ff46689a36d44cd66086f3" WARN Always "A complete layer cannot be read back from disk"
        happened "Layer @SOCI_LAYER@ is complete, but its file cannot be read to check its digest: @SOCI_ERROR@."
        means "Reads that hit the bad place fetch the data from the registry again."
        act "Have the disk checked.";
    DiskFull = "a3ad0904e4194d789d0f67227866798c" ERROR Always "There is no room for fetched data"
        happened "What was fetched for a layer cannot be kept on disk: @SOCI_ERROR@."
        means "Containers go on: reads are served from the network, and the same data is fetched again each time. It is slow and costs transfer."
        act "Make room on the filesystem of the snapshotter's root directory (df /var/lib/soci-snapshotter-grpc), for example by removing images \
             that nobody uses.";
    DiskHasRoom = "0a827a8fcc704938a978bf126b6d1bfe" INFO Always "There is room for fetched data again"
        happened "Fetched data can be kept on disk again."
        means "Reads are as fast as before."
        act "Nothing.";
    NotEvicted = "5f2f54b0a4d44b63a9f3c7c8c1a0d2e7" WARN Always "The layer store cannot be kept below its quota"
        happened "The layer store is larger than [layer_store] max_size allows, and nothing could be evicted: @SOCI_ERROR@."
        means "Containers go on. What does not fit is fetched from the registry again each time it is read."
        act "See that the filesystem of the snapshotter's root directory can punch holes (ext4, xfs and btrfs can) and is not mounted read-only.";
    NoRoomForSpan = "5b32023df20347a1bbac1189d1bf911f" WARN Always "There is no room to unpack a large span"
        happened "Span @SOCI_SPAN@ of layer @SOCI_LAYER@ is too large for memory and the disk has no room for it: @SOCI_ERROR@."
        means "Each read in it inflates it from its start: slow, but right."
        act "Make room on the filesystem of the snapshotter's root directory.";
    NoScratch = "516d981f48d14bfca97abd7cb1b6b26d" WARN Always "The snapshotter runs without its scratch file"
        happened "The scratch file for inflated data could not be made: @SOCI_ERROR@."
        means "Layers are inflated again when memory runs short: reads of large images are slower."
        act "Make room below the snapshotter's root directory, or put it on a filesystem that has unnamed files (O_TMPFILE); then restart the daemon.";
    LayerNotRestored = "a8935910205d415888e4c1be83dc1dc6" ERROR Always "A lazily loaded layer could not be shown again"
        happened "After its start the daemon could not serve snapshot @SOCI_SNAPSHOT@ again: @SOCI_ERROR@."
        means "Containers that use the layer get errors (ESTALE) for what is in it; new ones cannot be started from the image."
        act "It is tried again when a container is started from it. If that does not help, remove the image and pull it again.";
    LayerExpected = "bc4ab61fd3e4b85206a2e628f403205d" WARN Always "A lazily loaded layer waits for its index file"
        happened "After its start the daemon found the zTOC of layer @SOCI_LAYER@ (snapshot @SOCI_SNAPSHOT@) of @SOCI_IMAGE@ missing or damaged: \
                  @SOCI_ERROR@. It is fetched again, from containerd or from the registry."
        means "Containers that use the layer wait until it is here. If the registry cannot be reached that may take a while; reads fail after \
               [blob] fetching_timeout_sec, and the next ones wait again."
        act "If it lasts, see whether the registry can be reached:\n\n    soci doctor @SOCI_IMAGE@\n\nA disk that damages files should be looked at.";
    LayerRestored = "545b65fa3d91432fb780b9321c92f543" INFO Always "A lazily loaded layer is back"
        happened "Snapshot @SOCI_SNAPSHOT@, which could not be served after the last start, is served now."
        means "Containers that use the layer can read it again."
        act "Nothing.";
    HolderGone = "b303d57f44364f0ca9551f6e5dec49d3" ERROR Always "Nobody keeps the FUSE connection for the next daemon"
        happened "soci-mount does not answer: @SOCI_ERROR@."
        means "Containers run as before. If the daemon ends now, all of them lose their lazily loaded layers until they are started again."
        act "Do not restart or upgrade the snapshotter before this is over:\n\n    systemctl restart soci-mount\n\nThe daemon hands the connection to \
             the new soci-mount within seconds and says so.";
    HolderReplaced = "c19c3ae175e940e2854d9c6d9f4732a8" INFO Always "The FUSE connection has a new keeper"
        happened "The daemon gave the FUSE descriptor to a new soci-mount."
        means "The daemon may be restarted again without harm."
        act "Nothing.";
    CustodianGone = "e145ae34cb2c3ec19780090181aaf77f" ERROR Always "Nobody acts on containers' files for the SOCI snapshotter"
        happened "soci-custodian, which removes, measures and unpacks files for the daemon, cannot be used: @SOCI_ERROR@."
        means "Containers run as before, also on layers that are not here yet. Space of removed images is not freed, and what asks how much a \
               container uses gets this as an error. Layers that the snapshotter would unpack are left to containerd."
        act "See why it is not there, and start it again:\n\n    systemctl status soci-custodian\n    systemctl restart soci-custodian\n\nThe daemon finds \
             it within seconds, says so, and removes what was left. A daemon that runs without systemd has to be started again itself.";
    CustodianBack = "79596a8521b28f9722955e027e8fe329" INFO Always "The SOCI snapshotter has a custodian again"
        happened "soci-custodian answers."
        means "What was to be removed from disk meanwhile is removed now."
        act "Nothing.";
    Stuck = "528f89a89d7547f496c33c10c6131e24" ERROR Always "A part of the SOCI snapshotter stands still"
        happened "The daemon has stopped telling systemd that it lives: @SOCI_ERROR@."
        means "Reads of lazily loaded layers may wait until systemd restarts the daemon (WatchdogSec= in its unit); then they go on."
        act "Nothing now. If it happens again, report it with the lines around this one.";
    NoJournal = "6adbb1e78e0240fe9186d3106cc77489" ERROR Always "A crash of the snapshotter may leave reads waiting"
        happened "This kernel cannot repeat requests that a dead daemon had taken (Linux 6.9 can), and they cannot be written down: @SOCI_ERROR@."
        means "Containers run as before, and restarts are as safe as ever. If the daemon crashes, a read that it had taken may wait until its \
               process is killed."
        act "If an older version of the snapshotter was installed over a newer one, install the newer one again. Otherwise restart soci-mount when no \
             container uses a lazily loaded image:\n\n    /usr/libexec/soci-snapshotter/soci-mount --unmount\n    systemctl restart soci-mount soci-snapshotter";
    FuseBroken = "04e35e1226964a1281b47441f6f5e78b" ERROR Always "The FUSE connection has failed"
        happened "The kernel's requests cannot be read or answered: @SOCI_ERROR@."
        means "Containers that read lazily loaded layers get errors or wait."
        act "Restart the daemon (systemctl restart soci-snapshotter). If it comes back, report it with the lines around this one.";
    TakenOver = "6c1f0c1c0b5d4f3e9a1f8a2a9be1c7d4" INFO Always "The snapshots of the Go snapshotter were taken over"
        happened "@SOCI_SNAPSHOTS@ snapshots, @SOCI_LAZY@ of them lazily loaded, came from @SOCI_DATABASE@; @SOCI_REFUSED@ could not be taken over."
        means "Images that are here need not be pulled again. Containers that ran on the Go snapshotter's lazily loaded layers lost them when it \
               ended: start them again."
        act "Nothing. The file is kept as it was; soci-snapshotter-grpc(8) says how to go back.";
    NotTakenOver = "e2f1c0a39c4d4f4d8f2d1f6b8a7c5e03" ERROR Always "A snapshot of the Go snapshotter could not be taken over"
        happened "Snapshot @SOCI_SNAPSHOT@ cannot be taken over: @SOCI_ERROR@."
        means "Containers cannot be started from it, or from what stands on it. Its directory and the Go snapshotter's records are left as they are."
        act "Remove the image or container that it belongs to from containerd, and pull or make it again.";
    TakeoverWaits = "a50c8d4b6d0e4b0f9b5a3c1e7d2f8b96" WARN Always "A lazily loaded layer of the Go snapshotter cannot be mounted yet"
        happened "Snapshot @SOCI_SNAPSHOT@ of @SOCI_IMAGE@ has no local record of how to serve it, and its index and zTOC cannot be had yet: @SOCI_ERROR@."
        means "Containers cannot be started from the image yet. Nothing else waits for it."
        act "Nothing if the registry is about to come back: it is tried again by itself, and when a container is started from the image. Otherwise \
             see that the image and its SOCI index are in the registry (soci doctor IMAGE), or remove the image and pull it again.";
    PredecessorChanged = "0b9d7c52f1a84a6fb6e3d48c9e5a7f21" WARN Always "The Go snapshotter has changed its records since they were taken over"
        happened "@SOCI_DATABASE@ is not as it was when it was taken over, or never was taken over: a Go snapshotter has run since."
        means "What it made is not known here: containers cannot be started from that."
        act "Remove from containerd what was pulled or made meanwhile, and pull it again; or, with the daemon stopped, move metadata.redb beside it \
             away: the next start takes over anew, and forgets what was made with this snapshotter.";
    StaleMount = "f7b8a6d95c3e4d21a0c4e2b1d9f68375" WARN Always "A lazily loaded layer is still mounted by the Go snapshotter"
        happened "Something is mounted on the directory of snapshot @SOCI_SNAPSHOT@, which only soci-mount may take away, at its start."
        means "Containers cannot be started from the image."
        act "Stop the Go snapshotter if it still runs, then:\n\n    systemctl restart soci-mount soci-snapshotter";
    StrangeDirectories = "d8ed19083cb84f23a323db36cf2da37d" WARN Always "There are snapshot directories that no record knows"
        happened "@SOCI_DIRECTORIES@ directories below snapshotter/snapshots are not in the snapshot database: @SOCI_NAMES@."
        means "Nothing: they are left alone. They take room."
        act "If this follows the loss of the database, bring back a copy of it. Directories of images that are gone may be removed by hand while the \
             daemon is stopped.";
    NotRemoved = "031a4b599381495fa76b9783cfbef2a6" WARN Always "Something that is not needed any more could not be removed"
        happened "A directory of a removed snapshot or layer, or a record, could not be removed: @SOCI_ERROR@."
        means "Nothing for containers. It takes room until it can be removed; the next cleanup or start tries again."
        act "If it goes on, look at the filesystem of the root directory, and whether soci-custodian runs.";
    LayersLost = "e8d84cdba0c3431abc03f15687dfb052" WARN Always "Layers were not on disk yet when the machine went down"
        happened "The machine lost power, or its kernel died, moments after these layers had been unpacked: @SOCI_LAYERS@ of them (@SOCI_NAMES@). Files in \
                  them may be empty, so they are pulled again."
        means "What needs one of these layers waits until it is here. Nothing else is concerned."
        act "Nothing, if the registry can be reached. The message that a layer cannot be pulled again says why.";
    LayersDoubtful = "e3f4ed1ba7bf47d6919937f84892ad75" WARN Always "containerd's layers were not on disk when the machine went down"
        happened "The machine lost power, or its kernel died, moments after containerd had unpacked these layers: @SOCI_LAYERS@ of them (@SOCI_NAMES@). Files \
                  in them may be empty. What image they are of was not said when they were unpacked, so they cannot be pulled again."
        means "Containers of that image may fail in strange ways: programs that cannot be executed, configuration that is empty."
        act "Remove the image that was pulled last before the failure, and pull it again. soci enable containerd (or cri) makes containerd say what a \
             layer is of.";
    LayerStillLost = "63482138944941ddb36e56336fc17966" WARN Always "A layer that was lost with the power cannot be pulled again yet"
        happened "Snapshot @SOCI_SNAPSHOT@ was not on disk when the machine went down, and pulling it again failed: @SOCI_ERROR@."
        means "Containers of its image do not start until it is here. It is tried again, less and less often, and whenever somebody needs it."
        act "Look at the way to the registry and the logins for it: soci doctor IMAGE. Or remove the image and pull it again.";
    NotSynced = "07a187a932fa4ec6824b607f59e1098f" WARN Always "Unpacked layers could not be written to disk"
        happened "Asking the kernel to write what was unpacked failed: @SOCI_ERROR@."
        means "Nothing while the machine runs. After a power cut these layers are taken for lost and pulled again."
        act "Look for messages about the disk in the kernel's log, and whether soci-custodian runs. It is tried again with the next layer.";
    LinkLost = "93af02344de344ef8f897b3b9eb0f72a" WARN Always "A lazily loaded layer has lost its directory"
        happened "The link of snapshot @SOCI_SNAPSHOT@ to its layer is gone and could not be made again: @SOCI_ERROR@."
        means "New containers cannot be started from the image; those that run are not concerned."
        act "Remove the image and pull it again.";
    LoginUnavailable = "af75f0d49cb24718865b3595fa216fac" WARN Always "A source of registry logins failed"
        happened "Source @SOCI_SOURCE@ of logins for @SOCI_HOST@ failed: @SOCI_ERROR@."
        means "The registry is asked with the other sources, or without a login. Private images may not be loaded lazily, and what is missing of \
               mounted ones cannot be fetched until the source works."
        act "Run the helper or look at the file that the message names. soci doctor IMAGE shows which source a registry is asked with.";
    MirrorIgnored = "7626465ce4fc4c248cc9841026690a6b" WARN Always "A mirror in the configuration is ignored"
        happened "A mirror of @SOCI_IMAGE_HOST@ cannot be used: @SOCI_ERROR@."
        means "Its layers come from other mirrors or the registry itself."
        act "Correct the [[resolver.host.\"…\".mirrors]] entry and reload the daemon.";
    HostsBroken = "0ead15435f5c40eca3e1d0f2174d326c" ERROR Always "The configuration of a registry cannot be used"
        happened "What is configured for @SOCI_IMAGE_HOST@ below registry.config_path has changed and cannot be understood: @SOCI_ERROR@."
        means "Nothing yet: what was configured before stays in force until the daemon is started again."
        act "Correct the file that the message names; the next request reads it. All registries at once:\n\n    soci-snapshotter-grpc config check";
    AuthoritiesUnreadable = "98d8c588e33e46498bc3e9a0da5b409c" WARN Always "Some of this machine's certificate authorities cannot be read"
        happened "A file of certificate authorities could not be read: @SOCI_ERROR@."
        means "Registries whose certificates come from these authorities are not trusted; their images are left to containerd, and what is missing \
               of mounted ones cannot be fetched."
        act "Reinstall ca-certificates, or correct SSL_CERT_FILE or SSL_CERT_DIR of the unit, and restart the daemon.";
    ProxyIgnored = "025a71e29581487d8e6dac3c0e4d7d7a" WARN Always "A proxy in the environment is ignored"
        happened "The value of @SOCI_VARIABLE@ in the environment of the daemon is not the URL of a proxy."
        means "Registries are asked without a proxy. Where only a proxy leads outside, images cannot be loaded lazily."
        act "Correct the variable in the unit (systemctl edit soci-snapshotter) and restart the daemon.";
    SecretsUnavailable = "5970f34c1b3c4de7a38f03a13f80f829" WARN Always "The registry logins of the cluster cannot be read"
        happened "Kubernetes secrets could not be listed or watched with the kubeconfig: @SOCI_ERROR@."
        means "Logins that were read before stay in use. Private images that only such a secret has a login for may not be loaded lazily, and \
               what is missing of mounted ones cannot be fetched."
        act "Correct kubeconfig_keychain.kubeconfig_path, the kubeconfig, or the rights of its user (get, list and watch secrets). It is tried \
             again every 30 seconds at most; nothing has to be restarted.";
    PrefetchUnusable = "835d298760fc466d8c327077fe19927d" WARN Always "A list of what to fetch first cannot be used"
        happened "The prefetch artifact @SOCI_DIGEST@ of a SOCI index cannot be fetched or read: @SOCI_ERROR@."
        means "The image is lazy all the same; its first seconds may take longer."
        act "Make the index again with the version of soci that is in use.";
    IndexStrange = "7035bcb1d3b94235add39b5dc66ec9ad" WARN Always "A SOCI index has an entry that cannot be used"
        happened "Blob @SOCI_DIGEST@ of a SOCI index does not say to which layer it belongs."
        means "That layer is not loaded lazily."
        act "Make the index again with the version of soci that is in use.";
    FewDescriptors = "edb52387fc8b45e7a0746892b17ca12b" WARN Always "The snapshotter may open too few files"
        happened "The limit of open files could not be raised: @SOCI_ERROR@."
        means "Some hundred lazily loaded layers may be too many."
        act "Set LimitNOFILE= of the unit to 1048576.";
    StatusUnavailable = "046f4bc6a3dc402897f9a97b018ec399" WARN Always "soci status will not work"
        happened "The socket for soci status could not be made: @SOCI_ERROR@."
        means "Nothing for containers."
        act "See that the directory of the daemon's socket exists and can be written.";
    SettingsNotKept = "42f54a91f8f44cecb44f81c7231c2d68" WARN Always "The settings in use could not be kept for a bad day"
        happened "The copy of the configuration that a later daemon uses when the file is broken could not be written: @SOCI_ERROR@."
        means "Nothing now. A daemon that is started with a broken configuration then uses an older copy, or does not start."
        act "Make room below the snapshotter's root directory.";
}

impl Message {
    pub const fn id(self) -> &'static str {
        self.entry().id
    }
    pub const fn level(self) -> Level {
        self.entry().level
    }
    /// The message with that `MESSAGE_ID`.
    pub fn with_id(id: &str) -> Option<Message> {
        Message::ALL.iter().copied().find(|message| message.id() == id)
    }
}

/// The field that carries a message's identity.
pub const ID_FIELD: &str = "message_id";

/// Says a message of the catalog: `say!(DiskFull, %error, "cannot keep fetched data")`. Fields and words as in tracing's own macros.
macro_rules! say {
    ($message:ident, $($fields_and_words:tt)+) => {
        ::tracing::event!(
            $crate::telemetry::catalog::Message::$message.level(),
            message_id = $crate::telemetry::catalog::Message::$message.id(),
            $($fields_and_words)+
        )
    };
}
pub(crate) use say;

/// Widest line of the catalog file: what fits a terminal with journalctl's indentation.
const WIDTH: usize = 74;

/// The catalog as journald reads it (`/usr/lib/systemd/catalog/soci-snapshotter.catalog`).
pub fn file() -> String {
    let mut out = String::from(
        "# Message catalog of soci-snapshotter: what journalctl -x says of its lines.\n\
         # Generated from src/telemetry/catalog.rs; a test compares the two.\n",
    );
    for message in Message::ALL {
        let entry = message.entry();
        let head = format!(
            "\n-- {}\nSubject: {}\nDefined-By: soci-snapshotter\nDocumentation: man:soci(1)\n",
            entry.id, entry.subject
        );
        out.push_str(&head);
        let parts = [("", entry.happened), ("For containers: ", entry.means), ("What to do: ", entry.act)];
        for (title, text) in parts {
            out.push('\n');
            wrap(&format!("{title}{text}"), &mut out);
        }
    }
    out
}

/// Breaks each line between words. Indented lines are commands and stay whole.
fn wrap(text: &str, out: &mut String) {
    for line in text.split('\n') {
        if line.starts_with(' ') {
            out.push_str(line);
            out.push('\n');
            continue;
        }
        let mut width = 0;
        for word in line.split_whitespace() {
            let length = word.chars().count();
            if width > 0 && width + 1 + length > WIDTH {
                out.push('\n');
                width = 0;
            }
            if width > 0 {
                out.push(' ');
                width += 1;
            }
            out.push_str(word);
            width += length;
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn identities_are_128_bits_in_hexadecimal_and_each_is_used_once() {
        let ids: HashSet<&str> = Message::ALL.iter().map(|m| m.id()).collect();
        assert_eq!(ids.len(), Message::ALL.len());
        for id in ids {
            assert!(id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{id}");
            assert!(Message::with_id(id).is_some());
        }
    }

    #[test]
    fn every_message_says_what_happened_what_it_means_and_what_to_do() {
        for message in Message::ALL {
            let Entry { subject, happened, means, act, .. } = message.entry();
            for text in [happened, means, act] {
                assert!(text.len() >= 8, "{message:?}: {text}");
            }
            assert!(!subject.contains('\n') && subject.chars().count() <= 80, "{message:?}: {subject}");
        }
    }

    #[test]
    fn lines_of_the_file_fit_a_terminal_and_begin_no_other_entry() {
        for line in file().lines() {
            assert!(line.chars().count() <= 80 || line.starts_with(' '), "{line}");
            assert!(!line.starts_with("--") || line.len() == 35, "{line}");
        }
    }

    #[test]
    fn the_packaged_catalog_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/soci-snapshotter.catalog");
        if std::env::var_os("SOCI_BLESS").is_some() {
            std::fs::write(path, file()).expect("written");
        }
        let packaged = std::fs::read_to_string(path).expect("the packaged catalog");
        assert!(packaged == file(), "{path} is not what the table gives: run this test again with SOCI_BLESS=1");
    }
}
