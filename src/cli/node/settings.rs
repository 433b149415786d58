//! What must be in containerd's configuration for lazy loading, in each version's way of writing it. Pure.
//!
//! ```text
//!                     1.x (version = 2)                                2.x (version = 3)
//! the plugin          [proxy_plugins.soci] type, address               the same, and capabilities, exports
//! ctr images pull     (the client unpacks)                             the transfer service must know the snapshotter: unpack_config
//! CRI                 …grpc.v1.cri.containerd snapshotter,             …cri.v1.images snapshotter,
//!                     disable_snapshot_annotations = false             disable_snapshot_annotations = false
//! ```

use serde_json::{Map, Value as Json, json};
use std::path::{Path, PathBuf};
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, TableLike, value};

/// What containerd calls the snapshotter.
pub const NAME: &str = "soci";
/// What containerd unpacks into if nobody says otherwise.
const DEFAULT: &str = "overlayfs";
/// Containers in user namespaces, with one range of ids and with several.
const CAPABILITIES: [&str; 2] = ["remap-ids", "multi-remap-ids"];
const CRI_V2: &str = "io.containerd.grpc.v1.cri";
const CRI_V3: &str = "io.containerd.cri.v1.images";
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// Why a configuration cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("the configuration is not TOML: {0}")]
    Syntax(String),
    #[error("{0} is not a table, though it should be one")]
    Shape(String),
    #[error(
        "the configuration is of version 1 (it has no line \"version = 2\"), whose CRI settings are written in another way: convert it with \
         containerd config migrate, or put \"version = 2\" at its top if it sets no plugins, and try again"
    )]
    VersionOne,
    #[error(
        "CRI is disabled (disabled_plugins names {0}): take it out of the list first, or use soci enable containerd"
    )]
    CriDisabled(String),
}

/// What is to be reached.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// containerd's way to the snapshotter: a socket.
    pub address: String,
    /// The snapshotter's root directory, for who looks at the plugin.
    pub root: String,
    /// `linux/amd64`.
    pub platform: String,
    pub scope: Scope,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Clients may ask for the snapshotter by name.
    Containerd,
    /// It is also what Kubernetes uses.
    Cri,
}

/// Way of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Schema {
    One,
    Two,
    Three,
}

fn schema(document: &DocumentMut) -> Schema {
    match document.get("version").and_then(Item::as_integer) {
        None | Some(..=1) => Schema::One,
        Some(2) => Schema::Two,
        Some(_) => Schema::Three,
    }
}

fn parse(text: &str) -> Result<DocumentMut, SettingsError> {
    text.parse::<DocumentMut>().map_err(|e| SettingsError::Syntax(e.to_string().trim().to_owned()))
}

/// The table at `path`, made where it is missing.
fn table<'d>(document: &'d mut DocumentMut, path: &[&str]) -> Result<&'d mut dyn TableLike, SettingsError> {
    let mut at: &mut dyn TableLike = document.as_table_mut();
    for (depth, key) in path.iter().enumerate() {
        let item = at.entry(key).or_insert_with(|| {
            let mut table = Table::new();
            // Only the last one gets a header of its own.
            table.set_implicit(depth + 1 < path.len());
            Item::Table(table)
        });
        at = item.as_table_like_mut().ok_or_else(|| SettingsError::Shape(path[..=depth].join(".")))?;
    }
    Ok(at)
}

fn find<'d>(document: &'d DocumentMut, path: &[&str]) -> Option<&'d dyn TableLike> {
    let mut at: &dyn TableLike = document.as_table();
    for key in path {
        at = at.get(key)?.as_table_like()?;
    }
    Some(at)
}

/// Where CRI's settings about snapshots are.
fn cri(schema: Schema) -> &'static [&'static str] {
    match schema {
        Schema::One | Schema::Two => &["plugins", CRI_V2, "containerd"],
        Schema::Three => &["plugins", CRI_V3],
    }
}

/// Sets a value unless it is there already, so that a comment beside it stays.
fn set(table: &mut dyn TableLike, key: &str, to: toml_edit::Value) {
    let plain = |v: &toml_edit::Value| v.clone().decorated("", "").to_string();
    if table.get(key).and_then(Item::as_value).is_none_or(|there| plain(there) != plain(&to)) {
        table.insert(key, value(to));
    }
}

/// `text` with everything that is wanted. `text` may be empty; then it begins with `version`. `is_second`: containerd is 2.x, which reads version 2
/// as well, and knows a plugin's exports.
pub fn apply(text: &str, version: u32, wanted: &Wanted, is_second: bool) -> Result<String, SettingsError> {
    let mut document = parse(text)?;
    if document.as_table().is_empty() && document.get("version").is_none() {
        document.insert("version", value(i64::from(version)));
    }
    write(&mut document, wanted, is_second)?;
    Ok(document.to_string())
}

fn write(document: &mut DocumentMut, wanted: &Wanted, is_second: bool) -> Result<(), SettingsError> {
    let schema = schema(document);
    let plugin = table(document, &["proxy_plugins", NAME])?;
    set(plugin, "type", "snapshot".into());
    set(plugin, "address", wanted.address.as_str().into());
    if is_second {
        // containerd then leaves the owners of containers in user namespaces to us; otherwise it copies whole images for them.
        set(plugin, "capabilities", CAPABILITIES.into_iter().collect::<Array>().into());
        let exports = table(document, &["proxy_plugins", NAME, "exports"])?;
        set(exports, "root", wanted.root.as_str().into());
        set(exports, "enable_remote_snapshot_annotations", "true".into());
    }
    // Its transfer service unpacks, whichever version its configuration is written in.
    if (is_second || schema == Schema::Three) && !unpacks(document) {
        let is_first = find(document, &["plugins", TRANSFER]).and_then(|t| t.get("unpack_config")).is_none();
        let transfer = table(document, &["plugins", TRANSFER])?;
        let item = transfer.entry("unpack_config").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
        // A list replaces containerd's built-in one, which has only its own snapshotter.
        let names = if is_first { &[DEFAULT, NAME][..] } else { &[NAME][..] };
        for name in names {
            let mut entry = Table::new();
            entry.insert("platform", value(wanted.platform.as_str()));
            entry.insert("snapshotter", value(*name));
            if let Some(tables) = item.as_array_of_tables_mut() {
                tables.push(entry);
            } else if let Some(array) = item.as_array_mut() {
                array.push(entry.into_inline_table());
            } else {
                return Err(SettingsError::Shape(format!("plugins.{TRANSFER}.unpack_config")));
            }
        }
    }
    if wanted.scope == Scope::Cri {
        if schema == Schema::One {
            return Err(SettingsError::VersionOne);
        }
        if let Some(disabled) = disabled_cri(document) {
            return Err(SettingsError::CriDisabled(disabled));
        }
        // It takes these from there only, also in a file of version 2 (2.2.1 migrates the rest of the old section, and not these).
        let schema = if is_second { Schema::Three } else { schema };
        let cri = table(document, cri(schema))?;
        set(cri, "snapshotter", NAME.into());
        set(cri, "disable_snapshot_annotations", false.into());
    }
    Ok(())
}

fn disabled_cri(document: &DocumentMut) -> Option<String> {
    let names = document.get("disabled_plugins")?.as_array()?;
    names.iter().filter_map(|n| n.as_str()).find(|n| matches!(*n, "cri" | CRI_V2 | CRI_V3)).map(str::to_owned)
}

/// Whether the transfer service unpacks into our snapshotter.
fn unpacks(document: &DocumentMut) -> bool {
    let Some(item) = find(document, &["plugins", TRANSFER]).and_then(|t| t.get("unpack_config")) else { return false };
    let ours = |t: &dyn TableLike| t.get("snapshotter").and_then(Item::as_str) == Some(NAME);
    match (item.as_array_of_tables(), item.as_array()) {
        (Some(tables), _) => tables.iter().any(|t| ours(t)),
        (_, Some(array)) => array.iter().filter_map(|v| v.as_inline_table()).any(|t| ours(t)),
        _ => false,
    }
}

/// `text` without what [`apply`] puts in, for a file that was changed since.
pub fn take_out(text: &str) -> Result<String, SettingsError> {
    let mut document = parse(text)?;
    let mut emptied: Vec<&[&str]> = Vec::new();
    if find(&document, &["proxy_plugins", NAME]).is_some() {
        table(&mut document, &["proxy_plugins"])?.remove(NAME);
        emptied.push(&["proxy_plugins"]);
    }
    if unpacks(&document) {
        let transfer = table(&mut document, &["plugins", TRANSFER])?;
        if let Some(tables) = transfer.get_mut("unpack_config").and_then(Item::as_array_of_tables_mut) {
            tables.retain(|entry| entry.get("snapshotter").and_then(Item::as_str) != Some(NAME));
            // What apply put beside it is containerd's own default.
            let own =
                |entry: &Table| entry.len() == 2 && entry.get("snapshotter").and_then(Item::as_str) == Some(DEFAULT);
            if tables.len() == 1 && tables.iter().all(own) {
                transfer.remove("unpack_config");
                emptied.push(&["plugins", TRANSFER]);
            }
        } else if let Some(array) = transfer.get_mut("unpack_config").and_then(Item::as_array_mut) {
            array.retain(|entry| {
                let name = entry.as_inline_table().and_then(|t| t.get("snapshotter")).and_then(|v| v.as_str());
                name != Some(NAME)
            });
        }
    }
    // Which containerd it was written for is not known any more.
    for cri in [cri(Schema::Two), cri(Schema::Three)] {
        if find(&document, cri).and_then(|t| t.get("snapshotter")).and_then(Item::as_str) == Some(NAME) {
            let settings = table(&mut document, cri)?;
            settings.remove("snapshotter");
            settings.remove("disable_snapshot_annotations");
            emptied.push(cri);
        }
    }
    for path in emptied {
        if let (Some((last, above)), true) = (path.split_last(), find(&document, path).is_some_and(TableLike::is_empty))
        {
            table(&mut document, above)?.remove(last);
        }
    }
    Ok(document.to_string())
}

/// Directories whose `*.toml` the configuration imports, in its order. `config` is where it is.
pub fn imported_directories(text: &str, config: &Path) -> Result<Vec<PathBuf>, SettingsError> {
    let document = parse(text)?;
    let imports = document.get("imports").and_then(Item::as_array);
    let patterns = imports.into_iter().flatten().filter_map(|v| v.as_str());
    let directories = patterns.filter_map(|pattern| pattern.strip_suffix("/*.toml")).map(|directory| {
        let parent = config.parent().unwrap_or(Path::new("/"));
        parent.join(directory)
    });
    Ok(directories.filter(|d| !d.to_string_lossy().contains('*')).collect())
}

/// `text` that also imports `path`.
pub fn importing(text: &str, path: &Path) -> Result<String, SettingsError> {
    let mut document = parse(text)?;
    let item = document.entry("imports").or_insert_with(|| value(Array::new()));
    let array = item.as_array_mut().ok_or_else(|| SettingsError::Shape("imports".into()))?;
    array.push(path.display().to_string());
    Ok(document.to_string())
}

/// A drop-in with what is wanted and nothing else.
pub fn drop_in(version: u32, wanted: &Wanted, is_second: bool) -> Result<String, SettingsError> {
    let settings = apply("", version, wanted, is_second)?;
    Ok(format!(
        "# Written by soci enable; soci disable takes it away again. containerd reads it when it starts.\n{settings}"
    ))
}

/// The version that a configuration says it has.
pub fn version(text: &str) -> Result<Option<u32>, SettingsError> {
    Ok(parse(text)?.get("version").and_then(Item::as_integer).and_then(|v| u32::try_from(v).ok()))
}

/// What a configuration comes to, as `containerd config dump` prints it.
pub struct Dump(DocumentMut);

impl Dump {
    pub fn parse(text: &str) -> Result<Dump, SettingsError> {
        Ok(Dump(parse(text)?))
    }

    /// The socket of the snapshotter, if containerd knows one.
    pub fn plugin_address(&self) -> Option<&str> {
        let plugin = find(&self.0, &["proxy_plugins", NAME])?;
        let is_snapshotter = plugin.get("type").and_then(Item::as_str) == Some("snapshot");
        plugin.get("address").and_then(Item::as_str).filter(|_| is_snapshotter)
    }

    /// The snapshotter of CRI and whether it is told about images; `None` where CRI is off.
    pub fn cri(&self) -> Option<(&str, bool)> {
        if disabled_cri(&self.0).is_some() {
            return None;
        }
        let cri = find(&self.0, cri(schema(&self.0)))?;
        let snapshotter = cri.get("snapshotter").and_then(Item::as_str)?;
        let disabled = cri.get("disable_snapshot_annotations").and_then(Item::as_bool).unwrap_or(true);
        Some((snapshotter, !disabled))
    }

    /// Whether `ctr images pull --snapshotter soci` works; `None` where the client unpacks itself (1.x).
    pub fn unpacks(&self) -> Option<bool> {
        (schema(&self.0) == Schema::Three).then(|| unpacks(&self.0))
    }

    /// Whether everything that is wanted is in effect.
    pub fn has(&self, wanted: &Wanted) -> bool {
        self.plugin_address() == Some(wanted.address.as_str())
            && self.unpacks() != Some(false)
            && (wanted.scope == Scope::Containerd || self.cri() == Some((NAME, true)))
    }

    /// Keys whose values differ from `before` with what is wanted put in: what a change would do beside what it is for.
    pub fn side_effects(&self, before: &Dump, wanted: &Wanted, is_second: bool) -> Result<Vec<String>, SettingsError> {
        let mut expected = before.0.clone();
        write(&mut expected, wanted, is_second)?;
        let mut out = Vec::new();
        differences("", &comparable(&expected), &comparable(&self.0), &mut out);
        out.retain(|key| !matches!(key.as_str(), "imports" | "version"));
        Ok(out)
    }
}

/// A configuration without what containerd adds to the entries that are ours: defaults of keys we do not set.
fn comparable(document: &DocumentMut) -> Json {
    let keep = |value: &mut Json, keys: &[&str]| {
        if let Some(entry) = value.as_object_mut() {
            entry.retain(|key, _| keys.contains(&key.as_str()));
        }
    };
    let mut all = plain(document.as_item());
    if let Some(plugin) = all.pointer_mut(&format!("/proxy_plugins/{NAME}")) {
        keep(plugin, &["type", "address"]);
    }
    let unpacks = all.pointer_mut(&format!("/plugins/{TRANSFER}/unpack_config")).and_then(Json::as_array_mut);
    for entry in unpacks.into_iter().flatten() {
        keep(entry, &["platform", "snapshotter"]);
    }
    all
}

/// A TOML value without its form.
fn plain(item: &Item) -> Json {
    if let Some(table) = item.as_table_like() {
        let entries = table.iter().map(|(key, item)| (key.to_owned(), plain(item)));
        return Json::Object(entries.collect::<Map<_, _>>());
    }
    if let Some(tables) = item.as_array_of_tables() {
        return tables.iter().map(|t| plain(&Item::Table(t.clone()))).collect();
    }
    match item.as_value() {
        Some(toml_edit::Value::Array(array)) => array.iter().map(|v| plain(&Item::Value(v.clone()))).collect(),
        Some(toml_edit::Value::String(text)) => json!(text.value()),
        Some(toml_edit::Value::Integer(number)) => json!(number.value()),
        Some(toml_edit::Value::Float(number)) => json!(number.value()),
        Some(toml_edit::Value::Boolean(truth)) => json!(truth.value()),
        Some(other) => json!(other.to_string().trim()),
        None => Json::Null,
    }
}

fn differences(at: &str, a: &Json, b: &Json, out: &mut Vec<String>) {
    let (Json::Object(left), Json::Object(right)) = (a, b) else {
        if a != b {
            out.push(at.to_owned());
        }
        return;
    };
    let is_empty = |v: Option<&Json>| v.is_none_or(|v| v.as_object().is_some_and(Map::is_empty));
    for key in left.keys().chain(right.keys().filter(|k| !left.contains_key(*k))) {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        match (left.get(key), right.get(key)) {
            (Some(a), Some(b)) => differences(&path, a, b, out),
            (a, b) if is_empty(a) && is_empty(b) => {}
            _ => out.push(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(scope: Scope) -> Wanted {
        Wanted { address: "/run/s.sock".into(), root: "/r".into(), platform: "linux/amd64".into(), scope }
    }

    #[test]
    fn settings_are_added_beside_comments_and_only_once() {
        let text =
            "# mine\nversion = 2 # two\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"p\" # pause\n";
        let once = apply(text, 2, &wanted(Scope::Cri), false).unwrap();
        assert!(
            once.starts_with("# mine\nversion = 2 # two\n") && once.contains("sandbox_image = \"p\" # pause"),
            "{once}"
        );
        assert!(once.contains("snapshotter = \"soci\"") && once.contains("address = \"/run/s.sock\""), "{once}");
        assert_eq!(apply(&once, 2, &wanted(Scope::Cri), false).unwrap(), once);
        assert!(Dump::parse(&once).unwrap().has(&wanted(Scope::Cri)));
        assert!(!Dump::parse(text).unwrap().has(&wanted(Scope::Containerd)));
    }

    #[test]
    fn version_3_also_has_the_transfer_service_and_keeps_its_default() {
        let text = apply("", 3, &wanted(Scope::Cri), true).unwrap();
        assert!(text.starts_with("version = 3\n"), "{text}");
        let dump = Dump::parse(&text).unwrap();
        assert_eq!((dump.unpacks(), dump.cri()), (Some(true), Some(("soci", true))));
        assert_eq!(text.matches("snapshotter = \"overlayfs\"").count(), 1, "{text}");
        // A configuration from the days of 1.x under containerd 2.x.
        let kept = apply("version = 2\n[plugins.'x']\n", 3, &wanted(Scope::Containerd), true).unwrap();
        assert!(kept.starts_with("version = 2\n") && unpacks(&parse(&kept).unwrap()), "{kept}");
        assert!(!apply("version = 2", 2, &wanted(Scope::Containerd), false).unwrap().contains("unpack_config"));
        let listed = "version = 3\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [{platform='a', snapshotter='b'}]\n";
        let more = apply(listed, 3, &wanted(Scope::Containerd), true).unwrap();
        assert!(Dump::parse(&more).unwrap().unpacks() == Some(true) && !more.contains("overlayfs"), "{more}");
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_way_out() {
        let refuse = |text| apply(text, 2, &wanted(Scope::Cri), false).unwrap_err().to_string();
        assert!(refuse("root = '/x'").contains("version = 2"));
        assert!(refuse("version = 2\ndisabled_plugins = ['cri']").contains("disabled_plugins"));
        assert!(refuse("version = 2\nproxy_plugins = 3").contains("proxy_plugins"));
        assert!(refuse("version =").contains("TOML"));
        // For clients that name the snapshotter themselves, version 1 does.
        assert!(apply("disabled_plugins = ['cri']", 2, &wanted(Scope::Containerd), false).is_ok());
    }

    #[test]
    fn taking_out_leaves_everything_else() {
        let text = "version = 3\n[proxy_plugins.other]\ntype = \"snapshot\"\n";
        let out = take_out(&apply(text, 3, &wanted(Scope::Cri), true).unwrap()).unwrap();
        let dump = Dump::parse(&out).unwrap();
        assert_eq!((dump.plugin_address(), dump.unpacks(), dump.cri()), (None, Some(false), None));
        assert!(!out.contains("plugins]") && !out.contains("overlayfs"), "{out}");
        assert!(out.contains("[proxy_plugins.other]"));
    }

    #[test]
    fn a_change_that_loses_something_is_seen() {
        let before =
            Dump::parse("version = 2\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'mine'\n").unwrap();
        let good = apply(&before.0.to_string(), 2, &wanted(Scope::Cri), false).unwrap();
        let effects =
            |text: &str| Dump::parse(text).unwrap().side_effects(&before, &wanted(Scope::Cri), false).unwrap();
        assert_eq!(effects(&good), Vec::<String>::new());
        let lost = good.replace("'mine'", "'default'");
        assert_eq!(effects(&lost), ["plugins.io.containerd.grpc.v1.cri.sandbox_image"]);
    }

    #[test]
    fn imports_are_found_and_added() {
        let config = Path::new("/etc/containerd/config.toml");
        let text = "imports = [\"conf.d/*.toml\", \"/x/*.toml\", \"/y/one.toml\"]\n";
        let wanted: Vec<PathBuf> = vec!["/etc/containerd/conf.d".into(), "/x".into()];
        assert_eq!(imported_directories(text, config).unwrap(), wanted);
        assert!(importing(text, Path::new("/z")).unwrap().contains("\"/z\""));
        assert_eq!(importing("", Path::new("/z")).unwrap(), "imports = [\"/z\"]\n");
    }
}
