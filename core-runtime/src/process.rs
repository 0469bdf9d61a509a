//! What a container starts, from the image's config and what the user asked for.

use std::{fs, path::Path};

use formats::oci::ContainerConfig;
use serde::{Deserialize, Serialize};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The first process of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Program and arguments; not empty.
    pub args: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: String,
    /// `user[:group]` as the image states it; names are looked up in the root file system.
    pub user: String,
}

/// Why a process cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// Neither the image nor the user names a program.
    #[error("the image names no program to run; give one: snapctl run IMAGE -- PROGRAM [ARGS]")]
    NoProgram,
    /// A user or group name that the root file system does not know.
    #[error("user {name:?} of the image is not in its /etc/{file}")]
    UnknownUser {
        /// The name.
        name: String,
        /// `passwd` or `group`.
        file: &'static str,
    },
}

/// Numeric user and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

impl Process {
    /// Entrypoint and command of the image; `args`, where given, replace the command.
    pub fn from_image(
        config: &ContainerConfig,
        args: &[String],
        env: &[String],
    ) -> Result<Self, ProcessError> {
        let mut all = config.entrypoint.clone().unwrap_or_default();
        if args.is_empty() {
            all.extend(config.cmd.clone().unwrap_or_default());
        } else {
            all.extend_from_slice(args);
        }
        if all.is_empty() {
            return Err(ProcessError::NoProgram);
        }
        let mut environment = config.env.clone();
        if !environment.iter().any(|pair| pair.starts_with("PATH=")) {
            environment.push(DEFAULT_PATH.to_owned());
        }
        for pair in env {
            let name = pair.split('=').next().unwrap_or(pair);
            environment.retain(|old| old.split('=').next() != Some(name));
            environment.push(pair.clone());
        }
        let cwd = match config.working_dir.as_str() {
            "" => "/".to_owned(),
            dir if dir.starts_with('/') => dir.to_owned(),
            dir => format!("/{dir}"),
        };
        Ok(Self {
            args: all,
            env: environment,
            cwd,
            user: config.user.clone(),
        })
    }

    /// Looks the user up in `rootfs` (numbers need no lookup). Symbolic links out of the root are
    /// not followed: a file that is one counts as missing.
    pub fn credentials(&self, rootfs: &Path) -> Result<Credentials, ProcessError> {
        let (user, group) = match self.user.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (self.user.as_str(), None),
        };
        let passwd = database(rootfs, "passwd");
        let groups = database(rootfs, "group");
        let mut found = Credentials::default();
        let mut name = String::new();
        if !user.is_empty() {
            let row = passwd
                .iter()
                .find(|row| row.first().is_some_and(|first| first == user));
            let by_id = || {
                passwd
                    .iter()
                    .find(|row| row.get(2).is_some_and(|id| id == user))
            };
            match (row.or_else(by_id), user.parse::<u32>()) {
                (Some(row), _) => {
                    name.clone_from(&row[0]);
                    found.uid = field(row, 2);
                    found.gid = field(row, 3);
                }
                (None, Ok(uid)) => found.uid = uid,
                (None, Err(_)) => {
                    return Err(ProcessError::UnknownUser {
                        name: user.to_owned(),
                        file: "passwd",
                    });
                }
            }
        }
        match group {
            Some(group) => {
                let row = groups
                    .iter()
                    .find(|row| row.first().is_some_and(|first| first == group));
                found.gid = match (row, group.parse::<u32>()) {
                    (Some(row), _) => field(row, 2),
                    (None, Ok(gid)) => gid,
                    (None, Err(_)) => {
                        return Err(ProcessError::UnknownUser {
                            name: group.to_owned(),
                            file: "group",
                        });
                    }
                };
            }
            None if !name.is_empty() => {
                let member = |row: &&Vec<String>| {
                    row.get(3)
                        .is_some_and(|names| names.split(',').any(|n| n == name))
                };
                found.groups = groups
                    .iter()
                    .filter(member)
                    .map(|row| field(row, 2))
                    .collect();
            }
            None => {}
        }
        Ok(found)
    }
}

fn database(rootfs: &Path, file: &str) -> Vec<Vec<String>> {
    let path = rootfs.join("etc").join(file);
    let plain =
        fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() < 1 << 20);
    let text = if plain {
        fs::read_to_string(&path).unwrap_or_default()
    } else {
        String::new()
    };
    text.lines()
        .map(|line| line.split(':').map(str::to_owned).collect())
        .collect()
}

fn field(row: &[String], index: usize) -> u32 {
    row.get(index)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_replace_the_command_but_not_the_entrypoint() {
        let config = ContainerConfig {
            entrypoint: Some(vec!["/e".into()]),
            cmd: Some(vec!["c".into()]),
            env: vec!["A=1".into(), "B=2".into()],
            working_dir: "w".into(),
            ..ContainerConfig::default()
        };
        let plain = Process::from_image(&config, &[], &[]).unwrap();
        assert_eq!(
            (plain.args, plain.cwd.as_str()),
            (vec!["/e".to_owned(), "c".into()], "/w")
        );
        let given = Process::from_image(&config, &["x".into()], &["B=3".into()]).unwrap();
        assert_eq!(given.args, ["/e", "x"]);
        assert_eq!(given.env, ["A=1", DEFAULT_PATH, "B=3"]);
        assert!(matches!(
            Process::from_image(&ContainerConfig::default(), &[], &[]),
            Err(ProcessError::NoProgram)
        ));
    }

    #[test]
    fn users_are_looked_up_in_the_image() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            root.path().join("etc/group"),
            "web:x:34:\nlogs:x:4:web,other\n",
        )
        .unwrap();
        let with = |user: &str| {
            Process {
                args: vec![],
                env: vec![],
                cwd: String::new(),
                user: user.into(),
            }
            .credentials(root.path())
        };
        assert_eq!(with("").unwrap(), Credentials::default());
        assert_eq!(
            with("web").unwrap(),
            Credentials {
                uid: 33,
                gid: 34,
                groups: vec![4]
            }
        );
        assert_eq!(
            with("33:logs").unwrap(),
            Credentials {
                uid: 33,
                gid: 4,
                groups: vec![]
            }
        );
        assert_eq!(
            with("1000").unwrap(),
            Credentials {
                uid: 1000,
                gid: 0,
                groups: vec![]
            }
        );
        assert!(with("nobody").is_err());
    }
}
