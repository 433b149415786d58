//! Logins that kubelet sent with a pull, kept while the image is: in memory, for the image and the registry they were sent for.
//!
//! They are sent once, with the pull, and an image that is not here yet needs them for as long as it takes. So they outlive the daemon:
//! [`CriLogins::sealed`] is what its successor reads with [`CriLogins::restore`]. Where that is kept is not known here; it is never a disk.
//!
//! They are what the pod's `imagePullSecrets` and kubelet's own providers know. Nothing tells when they end; a pull of the same image
//! renews them. They are shown to the registry that the image names (or the server they name), never to a mirror.

use super::{Credential, Lookup, Query, Secret, Source};
use crate::oci::Reference;
use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;
use zeroize::Zeroizing;

/// Images remembered. kubelet collects images long before a node has as many.
const CAPACITY: usize = 4096;

/// What a pull may carry (`runtime.v1.AuthConfig`).
#[derive(Default)]
pub struct CriAuth {
    pub username: String,
    pub password: String,
    /// base64 of `user:password`.
    pub auth: String,
    /// The registry it is for, if it says.
    pub server_address: String,
    pub identity_token: String,
    pub registry_token: String,
}

struct Login {
    credential: Credential,
    /// None: that of the image.
    server: Option<String>,
    age: u64,
}

/// The logins of all images that were pulled.
#[derive(Default)]
pub struct CriLogins {
    state: Mutex<(u64, HashMap<String, Login>)>,
    changed: Notify,
}

/// One login as a successor reads it. A daemon of another release that has other fields takes what it knows.
#[derive(serde::Serialize, serde::Deserialize)]
struct Kept<'a> {
    image: Cow<'a, str>,
    #[serde(default)]
    server: Option<Cow<'a, str>>,
    kind: Cow<'a, str>,
    #[serde(default)]
    user: Cow<'a, str>,
    secret: Secret,
}

impl CriLogins {
    fn lock(&self) -> MutexGuard<'_, (u64, HashMap<String, Login>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when logins have come or gone since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Says that they have to be kept anew.
    pub fn touch(&self) {
        self.changed.notify_one();
    }

    /// All of them, behind `head`, for [`CriLogins::restore`] of the next daemon. Secrets are in it as they are.
    pub fn sealed(&self, head: &[u8]) -> Zeroizing<Vec<u8>> {
        let state = self.lock();
        let mut logins: Vec<_> = state.1.iter().collect();
        logins.sort_by_key(|(_, login)| login.age);
        let kept: Vec<_> = logins.into_iter().map(|(image, login)| kept(image, login)).collect();
        // One allocation: what a growing buffer leaves behind would not be wiped.
        let room =
            kept.iter().map(|k| 6 * (k.image.len() + k.user.len() + k.secret.expose().len()) + 2048).sum::<usize>();
        let mut out = Zeroizing::new(Vec::with_capacity(head.len() + room + 16));
        out.extend_from_slice(head);
        // Strings and a vector: there is nothing in it that JSON does not have.
        let _ = serde_json::to_writer(&mut *out, &kept);
        out
    }

    /// Takes over what an earlier daemon had, beside what is known already; how many there were. None if they make no sense.
    pub fn restore(&self, text: &[u8]) -> Option<usize> {
        let kept: Vec<Kept<'_>> = serde_json::from_slice(text).ok()?;
        let mut state = self.lock();
        let (clock, logins) = &mut *state;
        let mut count = 0;
        for Kept { image, server, kind, user, secret } in kept.into_iter().take(CAPACITY) {
            let credential = match &*kind {
                "password" => Credential::Password { user: user.into_owned(), password: secret },
                "identity" => Credential::Identity(secret),
                "registry" => Credential::Registry(secret),
                _ => continue,
            };
            *clock += 1;
            let login = Login { credential, server: server.map(Cow::into_owned), age: *clock };
            logins.entry(image.into_owned()).or_insert(login);
            count += 1;
        }
        Some(count)
    }

    /// Keeps what was sent with the pull of `image`. A pull without a login leaves what is known: the image may be served still.
    pub fn remember(&self, image: &str, auth: CriAuth) {
        let (Ok(reference), Some((credential, server))) = (Reference::familiar(image), login(auth)) else { return };
        let mut state = self.lock();
        let (clock, logins) = &mut *state;
        *clock += 1;
        let key = key(&reference);
        if logins.len() >= CAPACITY && !logins.contains_key(&key) {
            let oldest = logins.iter().min_by_key(|(_, login)| login.age).map(|(key, _)| key.clone());
            oldest.map(|oldest| logins.remove(&oldest));
        }
        logins.insert(key, Login { credential, server, age: *clock });
        drop(state);
        self.touch();
    }

    /// Forgets what was sent for `image`.
    pub fn forget(&self, image: &str) {
        if let Ok(reference) = Reference::familiar(image) {
            self.lock().1.remove(&key(&reference));
            self.touch();
        }
    }
}

fn kept<'a>(image: &'a str, login: &'a Login) -> Kept<'a> {
    let (kind, user, secret) = match &login.credential {
        Credential::Password { user, password } => ("password", user.as_str(), password),
        Credential::Identity(secret) => ("identity", "", secret),
        Credential::Registry(secret) => ("registry", "", secret),
    };
    let server = login.server.as_deref().map(Cow::Borrowed);
    Kept { image: image.into(), server, kind: kind.into(), user: user.into(), secret: secret.clone() }
}

/// The reference as containerd puts it on snapshots: the tag does not count beside a digest.
fn key(reference: &Reference) -> String {
    let mut reference = reference.clone();
    if reference.digest.is_some() {
        reference.tag = None;
    }
    reference.to_string()
}

fn login(auth: CriAuth) -> Option<(Credential, Option<String>)> {
    let credential = if !auth.username.is_empty() {
        Credential::Password { user: auth.username, password: Secret::new(auth.password) }
    } else if !auth.identity_token.is_empty() {
        Credential::Identity(Secret::new(auth.identity_token))
    } else if !auth.auth.is_empty() {
        super::docker::basic_pair(&Secret::new(auth.auth))?
    } else if !auth.registry_token.is_empty() {
        Credential::Registry(Secret::new(auth.registry_token))
    } else {
        return None;
    };
    let server = super::docker::host_of(&auth.server_address);
    Some((credential, (!server.is_empty()).then(|| server.to_owned())))
}

impl Source for CriLogins {
    fn name(&self) -> &str {
        "kubelet (CRI)"
    }

    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a> {
        let hub = super::docker::host_of(super::DOCKER_HUB);
        let plain = |host: &'a str| match host {
            "docker.io" | "registry-1.docker.io" => hub,
            host => host,
        };
        let state = self.lock();
        let login = state.1.get(&key(query.reference));
        let found = login.filter(|login| {
            let server = login.server.as_deref().unwrap_or(&query.reference.host);
            plain(query.host) == plain_of(server, hub)
        });
        let found = found.map(|login| login.credential.clone()).into_iter().collect();
        Box::pin(std::future::ready(Ok(found)))
    }
}

fn plain_of<'s>(server: &'s str, hub: &'s str) -> &'s str {
    match server {
        "docker.io" | "registry-1.docker.io" => hub,
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lookup(logins: &CriLogins, host: &str, image: &str) -> Vec<Credential> {
        let reference = Reference::familiar(image).unwrap();
        logins.lookup(&Query { host, reference: &reference }).await.unwrap()
    }

    fn password(user: &str, password: &str) -> Vec<Credential> {
        vec![Credential::Password { user: user.into(), password: Secret::new(password) }]
    }

    fn auth(user: &str, password: &str) -> CriAuth {
        CriAuth { username: user.into(), password: password.into(), ..CriAuth::default() }
    }

    #[tokio::test]
    async fn a_login_is_for_its_image_and_its_registry() {
        let logins = CriLogins::default();
        logins.remember("r.example/a:1", auth("u", "p"));
        assert_eq!(lookup(&logins, "r.example", "r.example/a:1").await, password("u", "p"));
        assert_eq!(lookup(&logins, "mirror.example", "r.example/a:1").await, [], "not for mirrors");
        assert_eq!(lookup(&logins, "r.example", "r.example/b:1").await, []);
        logins.remember("r.example/a:1", CriAuth::default());
        assert_eq!(
            lookup(&logins, "r.example", "r.example/a:1").await,
            password("u", "p"),
            "nothing sent, nothing lost"
        );
        logins.remember("r.example/a:1", auth("u", "new"));
        assert_eq!(lookup(&logins, "r.example", "r.example/a:1").await, password("u", "new"));
        logins.forget("r.example/a:1");
        assert_eq!(lookup(&logins, "r.example", "r.example/a:1").await, []);
    }

    #[tokio::test]
    async fn short_names_and_docker_hubs_many_names_mean_the_same() {
        let logins = CriLogins::default();
        logins.remember("busybox", auth("u", "p"));
        assert_eq!(
            lookup(&logins, "registry-1.docker.io", "docker.io/library/busybox:latest").await,
            password("u", "p")
        );
        let server_address = "https://index.docker.io/v1/".to_owned();
        logins.remember("team/app:2", CriAuth { auth: "dTpw".into(), server_address, ..CriAuth::default() });
        assert_eq!(lookup(&logins, "registry-1.docker.io", "docker.io/team/app:2").await, password("u", "p"));
        let digest = crate::oci::Digest::of(b"x");
        logins.remember(&format!("r.example/a:1@{digest}"), auth("u", "d"));
        assert_eq!(lookup(&logins, "r.example", &format!("r.example/a@{digest}")).await, password("u", "d"));
    }

    #[tokio::test]
    async fn a_successor_knows_what_was_sent_and_nonsense_is_no_login() {
        let logins = CriLogins::default();
        logins.remember("r.example/a:1", auth("u", "p\"\u{1}"));
        logins.remember("r.example/b:1", CriAuth { identity_token: "t".into(), ..CriAuth::default() });
        let server_address = "https://r.example".to_owned();
        let token = CriAuth { registry_token: "r".into(), server_address, ..CriAuth::default() };
        logins.remember("r.example/c:1", token);
        let sealed = logins.sealed(b"HEAD");
        let next = CriLogins::default();
        assert_eq!(next.restore(&sealed[4..]), Some(3));
        for image in ["r.example/a:1", "r.example/b:1", "r.example/c:1"] {
            let found = lookup(&next, "r.example", image).await;
            assert!(found.len() == 1 && found == lookup(&logins, "r.example", image).await, "{image}");
        }
        for nonsense in [&b""[..], b"{}", b"[{}]", &sealed[..], &sealed[4..20]] {
            assert_eq!(CriLogins::default().restore(nonsense), None);
        }
        assert_eq!(next.restore(br#"[{"image":"x","kind":"of tomorrow","secret":"s"}]"#), Some(0));
    }

    #[tokio::test]
    async fn what_was_sent_longest_ago_makes_room() {
        let logins = CriLogins::default();
        for n in 0..=CAPACITY {
            logins.remember(&format!("r.example/a:{n}"), auth("u", "p"));
        }
        assert_eq!(lookup(&logins, "r.example", "r.example/a:0").await, []);
        assert_eq!(lookup(&logins, "r.example", "r.example/a:1").await.len(), 1);
    }
}
