//! One image: whether its registry can be reached, lets this node in, and has what makes the image lazy.

use super::Finding;
use crate::{
    cli::{
        image::{self, ImageError},
        output,
    },
    config::Config,
    daemon,
    index::NoIndex,
    oci::Reference,
    registry::Class,
};

pub fn look(name: &str, config: &Config) -> Vec<Finding> {
    let reference: Reference = match name.parse() {
        Ok(reference) => reference,
        Err(error) => {
            let fix = "write it in full, as containerd does: docker.io/library/redis:7";
            return vec![Finding::problem("image", format!("{error}"), fix)];
        }
    };
    let mut out = logins(&reference, config);
    match image::look(&reference, config, None) {
        Ok(image) => {
            out.push(Finding::ok("registry", format!("{} answers and has {name}", reference.host)));
            out.push(match &image.index {
                Ok(index) => {
                    let lazy = image.layers.iter().filter(|layer| index.layers.contains_key(&layer.digest)).count();
                    Finding::ok(
                        "index",
                        format!("{}: {lazy} of {} layers can be lazy", index.digest, image.layers.len()),
                    )
                }
                Err(error @ (NoIndex::NotFound | NoIndex::Disabled)) => Finding::warning(
                    "index",
                    format!("{name}: {}", output::chain(error)),
                    "soci convert makes an image with an index; soci explain shows what happens without one",
                ),
                Err(error) => Finding::problem(
                    "index",
                    format!("{name}: {}", output::chain(error)),
                    "make the index again and push it",
                ),
            });
        }
        Err(error) => out.push(Finding::problem("registry", output::chain(&error), advice(&error, &reference))),
    }
    out
}

/// Which sources of logins know the registry. What they know is not shown.
fn logins(reference: &Reference, config: &Config) -> Vec<Finding> {
    const CHECK: &str = "login";
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let asked = runtime.block_on(daemon::logins_of(config, reference));
    let mut out = Vec::new();
    let mut found = false;
    for (source, result) in asked {
        match result {
            Ok(true) => {
                found = true;
                out.push(Finding::ok(CHECK, format!("{source} has a login for {}", reference.host)));
            }
            Ok(false) => {}
            Err(error) => out.push(Finding::problem(
                CHECK,
                format!("{source} failed: {}", output::chain(&error)),
                "run the helper by hand, or correct the file that is named",
            )),
        }
    }
    if !found {
        let found = format!("no source has a login for {}: it is asked without one", reference.host);
        out.push(Finding::skipped(CHECK, found));
    }
    out
}

fn advice(error: &ImageError, reference: &Reference) -> String {
    let host = &reference.host;
    let class = match error {
        ImageError::Registry { source, .. } => source.class(),
        ImageError::NoPlatform { .. } => return "push an image for this platform".to_owned(),
        _ => return format!("see whether {host} can be reached from here: curl -sS https://{host}/v2/"),
    };
    match class {
        Class::Unauthorized => format!(
            "log in where the daemon looks, as root: docker login {host} (it reads the docker configuration of its own user; a login of another \
             user is not seen)"
        ),
        Class::NotFound => {
            "see whether the name and the tag are right; some registries also say this to who may not know".to_owned()
        }
        _ => format!(
            "see whether {host} can be reached from here (curl -sS https://{host}/v2/), and what [resolver] in the configuration says of it"
        ),
    }
}
