//! Image RPCs, translation only.

use super::{Cri, missing, status};
use crate::error::Error;
use crate::images::{Auth, Image as StoredImage, ImageRef};
use crate::vm::launch::unix_ns;
use atoll_cri::v1::{
    AuthConfig, FilesystemIdentifier, FilesystemUsage, Image, ImageFilter, ImageFsInfoResponse,
    ImageStatusRequest, ImageStatusResponse, Int64Value, PullImageRequest, PullImageResponse,
    RemoveImageRequest, RemoveImageResponse, UInt64Value,
};
use atoll_spec::images::{ACCESS, PULL_SECRET, PullSecret};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::HashMap;
use tonic::Status;

/// Longest part of what a pull says of its secret: names of Kubernetes have 253 bytes at most.
const MOST_OF_A_SECRET: usize = 253;

impl Cri {
    pub(super) fn images(&self, filter: Option<ImageFilter>) -> Vec<Image> {
        let store = self.service.images();
        match filter.and_then(|f| f.image).map(|i| i.image).filter(|i| !i.is_empty()) {
            Some(name) => store.status(&name).iter().map(wire_image).collect(),
            None => store.list().iter().map(wire_image).collect(),
        }
    }

    pub(super) fn image(&self, request: ImageStatusRequest) -> Result<ImageStatusResponse, Status> {
        let name = request.image.ok_or_else(|| missing("image"))?.image;
        let found = self.service.images().status(&name);
        let mut info = HashMap::new();
        if let Some(image) = found.as_ref().filter(|_| request.verbose) {
            let config = serde_json::to_string(&image.config).unwrap_or_default();
            info.insert("config".to_owned(), config);
        }
        if let Some(access) = self.service.images().access(&name).filter(|_| request.verbose) {
            info.insert(ACCESS.to_owned(), serde_json::to_string(&access).unwrap_or_default());
        }
        Ok(ImageStatusResponse { image: found.as_ref().map(wire_image), info })
    }

    pub(super) async fn pull(&self, request: PullImageRequest) -> Result<PullImageResponse, Status> {
        let image = request.image.ok_or_else(|| missing("image"))?;
        let reference: ImageRef = image.image.parse().map_err(|e| status(Error::Image(e)))?;
        let auth = request.auth.map(auth).transpose()?.flatten();
        let secret = image.annotations.get(PULL_SECRET).map(|text| secret(text)).transpose()?;
        let pulled = self.service.images().pull_with(&reference, auth, secret).await;
        let id = pulled.map_err(|e| status(Error::Image(e)))?;
        Ok(PullImageResponse { image_ref: id.to_string() })
    }

    pub(super) async fn remove_image_named(
        &self,
        request: RemoveImageRequest,
    ) -> Result<RemoveImageResponse, Status> {
        let name = request.image.ok_or_else(|| missing("image"))?.image;
        self.service.images().remove(&name).await.map_err(|e| status(Error::Image(e)))?;
        Ok(RemoveImageResponse {})
    }

    pub(super) fn fs_info(&self) -> Result<ImageFsInfoResponse, Status> {
        let usage = self.service.images().fs_usage().map_err(|e| status(Error::Image(e)))?;
        let usage = FilesystemUsage {
            timestamp: unix_ns(),
            fs_id: Some(FilesystemIdentifier { mountpoint: usage.mount_point.display().to_string() }),
            used_bytes: Some(UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(UInt64Value { value: usage.used_inodes }),
        };
        Ok(ImageFsInfoResponse { image_filesystems: vec![usage.clone()], container_filesystems: vec![usage] })
    }
}

fn wire_image(image: &StoredImage) -> Image {
    // The user of the image by number or name, without its group.
    let user = image.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<i64>().ok();
    Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.or(user.is_empty().then_some(0)).map(|value| Int64Value { value }),
        username: if uid.is_none() { user.to_owned() } else { String::new() },
        spec: None,
        pinned: false,
    }
}

/// Where the credentials of a pull came from.
fn secret(text: &str) -> Result<PullSecret, Status> {
    let bad =
        |why: &dyn std::fmt::Display| Status::invalid_argument(format!("annotation {PULL_SECRET}: {why}"));
    let secret: PullSecret = serde_json::from_str(text).map_err(|error| bad(&error))?;
    let longest =
        [&secret.namespace, &secret.name, &secret.uid, &secret.hash].into_iter().map(String::len).max();
    if longest > Some(MOST_OF_A_SECRET) { Err(bad(&"too long")) } else { Ok(secret) }
}

/// Credentials of a pull; an empty message means none.
pub(super) fn auth(config: AuthConfig) -> Result<Option<Auth>, Status> {
    if !config.identity_token.is_empty() {
        return Ok(Some(Auth::Identity(config.identity_token)));
    }
    if !config.registry_token.is_empty() {
        return Ok(Some(Auth::Bearer(config.registry_token)));
    }
    if !config.username.is_empty() {
        return Ok(Some(Auth::Basic { username: config.username, password: config.password }));
    }
    if config.auth.is_empty() {
        return Ok(None);
    }
    let bad = || Status::invalid_argument("auth is not base64 of user:password");
    let text =
        STANDARD.decode(config.auth.trim()).ok().and_then(|b| String::from_utf8(b).ok()).ok_or_else(bad)?;
    let (username, password) = text.split_once(':').ok_or_else(bad)?;
    let password = password.trim_end_matches('\0');
    Ok(Some(Auth::Basic { username: username.to_owned(), password: password.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_in_several_forms() {
        let of = |config| auth(config).unwrap();
        assert_eq!(of(AuthConfig::default()), None);
        let basic = Some(Auth::Basic { username: "u".into(), password: "p:q".into() });
        assert_eq!(of(AuthConfig { auth: STANDARD.encode("u:p:q"), ..Default::default() }), basic);
        let config = AuthConfig { username: "u".into(), password: "p:q".into(), ..Default::default() };
        assert_eq!(of(config), basic);
        assert_eq!(
            of(AuthConfig { registry_token: "t".into(), ..Default::default() }),
            Some(Auth::Bearer("t".into()))
        );
        assert!(auth(AuthConfig { auth: "?".into(), ..Default::default() }).is_err());
    }
}
