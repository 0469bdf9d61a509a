//! Credential helpers: external programs named `docker-credential-NAME`.

use std::{ffi::OsString, process::Stdio};

use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    time::timeout,
};

use super::{Credential, CredentialsError, DockerConfigOptions, Secret};

const MAX_OUTPUT_BYTES: u64 = 256 << 10;
/// What helpers say when they have nothing; there is no exit status for it.
const NOT_FOUND: [&str; 3] = [
    "credentials not found",
    "no credentials server URL",
    "no credentials found",
];
/// The user name that says that the secret is a refresh token.
const TOKEN_USER: &str = "<token>";

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks the helper `name` for the credential of `server`. A helper that takes too long is killed.
pub(super) async fn lookup(
    name: &str,
    server: &str,
    options: &DockerConfigOptions,
) -> Result<Option<Credential>, CredentialsError> {
    let program = format!("docker-credential-{name}");
    let failed = |problem: String| CredentialsError::Helper {
        program: program.clone(),
        problem,
    };
    let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(is_name) {
        return Err(failed("the name is not that of a program".to_owned()));
    }
    let path = options
        .helper_dirs
        .iter()
        .map(|dir| dir.join(&program))
        .find(|path| path.exists())
        .map_or_else(|| OsString::from(&program), Into::into);
    let limit = options.helper_timeout;
    let output = match timeout(limit, run(path, server)).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(CredentialsError::HelperTimeout { program, limit }),
    };
    let text = String::from_utf8_lossy(&output.text);
    if !output.success {
        let line: String = text.chars().take(200).filter(|c| !c.is_control()).collect();
        if NOT_FOUND.iter().any(|known| line.contains(known)) {
            return Ok(None);
        }
        return Err(failed(format!("it failed and said {line:?}")));
    }
    let answer: Answer = serde_json::from_str(&text)
        // The error may quote the secret.
        .map_err(|_| failed("it printed something that is no credential".to_owned()))?;
    let secret = Secret::new(answer.secret);
    Ok(match answer.username.as_str() {
        TOKEN_USER => Some(Credential::IdentityToken(secret)),
        "" => None,
        _ => Some(Credential::Basic {
            username: answer.username,
            password: secret,
        }),
    })
}

struct Output {
    success: bool,
    text: Vec<u8>,
}

async fn run(program: OsString, server: &str) -> std::io::Result<Output> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read its input may still answer.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_OUTPUT_BYTES).read_to_end(&mut text).await?;
    }
    let success = child.wait().await?.success();
    Ok(Output { success, text })
}
