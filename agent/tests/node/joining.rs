//! Joining: every way in which it can fail, what the console is told, and that it comes right by itself.

use crate::host::{Host, NODE, SOON, until};
use crate::runtime::Events;
use atoll_scripted_cluster::{Life, Reach, Seen, TOKEN, YEAR, authority};
use atoll_spec::node::JoinState;
use std::time::{Duration, Instant};

const CSRS: &str = "POST /apis/certificates.k8s.io/v1/certificatesigningrequests";

/// How often the token was shown, to anybody.
fn tokens_shown(host: &Host, from: Instant) -> usize {
    host.cluster.seen_since(from).iter().filter(|seen| seen.token.is_some()).count()
}

/// The console has a line with these words, and so has the file that hostd shows.
async fn told(host: &Host, words: &[&str]) {
    host.line(words).await;
    until("the status file", SOON, || {
        let status = host.status().filter(|status| status.join == JoinState::Failed)?;
        status.last_error.filter(|line| words.iter().all(|word| line.contains(word)))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_token_is_named_not_sent_and_put_right_without_a_restart() {
    let mut host = Host::new(Events::Told).await;
    let begun = Instant::now();
    let mut join = host.join();
    join.token = "zzzzzz.0123456789abcdef".into();
    host.configure(Some(join));
    host.start();
    told(&host, &["cannot join", "does not know the token zzzzzz", "make a new token"]).await;
    assert_eq!(tokens_shown(&host, begun), 0);
    assert!(!host.log().contains("0123456789abcdef"), "the console shows no secret");
    host.configure(Some(host.join()));
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_token_is_named_and_a_new_one_joins() {
    let mut host = Host::new(Events::Told).await;
    // The controller that signs cluster-info drops the signature of a token that expired.
    host.cluster.token(false, false);
    host.start();
    told(&host, &["cannot join", "does not know the token abcdef", "expired", "make a new token"]).await;
    host.cluster.token(true, true);
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_revoked_between_cluster_info_and_request_is_named() {
    let mut host = Host::new(Events::Told).await;
    host.cluster.token(true, false);
    host.start();
    told(&host, &["cannot join", "refused the token abcdef", "401", "make a new token"]).await;
    assert!(host.cluster.get(NODE).is_none());
    host.cluster.token(true, true);
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_ca_pin_sends_no_token() {
    let mut host = Host::new(Events::Told).await;
    let begun = Instant::now();
    let mut join = host.join();
    join.ca_pins = vec![format!("sha256:{}", "0".repeat(64))];
    host.configure(Some(join));
    host.start();
    told(&host, &["cannot join", "no pin", &host.cluster.pin()]).await;
    assert_eq!((tokens_shown(&host, begun), host.cluster.count(begun, CSRS)), (0, 0));
    host.configure(Some(host.join()));
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_certificate_than_the_pinned_ones_gets_no_token() {
    let mut host = Host::new(Events::Told).await;
    let begun = Instant::now();
    host.cluster.serve_as(&authority("thief"), YEAR);
    host.start();
    told(&host, &["cannot join", "is not from the CA", "the token was not sent"]).await;
    assert_eq!(tokens_shown(&host, begun), 0);
    host.cluster.serve_as(host.cluster.ca(), YEAR);
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_certificate_after_the_node_joined_is_not_spoken_to_and_pods_stay() {
    let host = Host::ready().await;
    host.bind("stays", serde_json::Value::Null);
    let before = host.wait_running("stays").await;
    host.cluster.serve_as(&authority("thief"), YEAR);
    let changed = Instant::now();
    host.line(&["lease of node node-1", "pods keep running"]).await;
    assert_eq!(host.cluster.seen_since(changed + Duration::from_millis(500)).len(), 0);
    host.cluster.serve_as(host.cluster.ca(), YEAR);
    host.line(&["lease of node node-1 renewed again"]).await;
    let after = host.wait_running("stays").await;
    let id = |pod: &serde_json::Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
    assert_eq!(id(&before), id(&after));
}

#[tokio::test(flavor = "multi_thread")]
async fn host_clock_years_behind_is_told_as_such_and_joins_once_it_is_right() {
    let mut host = Host::new(Events::Told).await;
    let begun = Instant::now();
    let year = YEAR.to;
    host.cluster.serve_as(host.cluster.ca(), Life { from: 3 * year, to: 4 * year });
    host.start();
    told(&host, &["cannot join", "by this host's clock", "is not valid before", "clock right"]).await;
    assert_eq!(tokens_shown(&host, begun), 0);
    host.cluster.serve_as(host.cluster.ca(), YEAR);
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_clock_years_ahead_is_told_as_such_and_joins_once_it_is_right() {
    let mut host = Host::new(Events::Told).await;
    let year = YEAR.to;
    host.cluster.serve_as(host.cluster.ca(), Life { from: -4 * year, to: -3 * year });
    host.start();
    told(&host, &["cannot join", "by this host's clock", "expired at", "clock right"]).await;
    host.cluster.serve_as(host.cluster.ca(), YEAR);
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn supervisor_unreachable_at_boot_is_joined_when_it_comes() {
    let mut host = Host::new(Events::Told).await;
    host.cluster.reach(Reach::Refused);
    host.start();
    told(&host, &["cannot join", "does not answer", "is the Supervisor up?"]).await;
    host.cluster.reach(Reach::Served);
    host.wait_ready().await;
    assert_eq!(host.status().map(|status| status.join), Some(JoinState::Joined));
}

#[tokio::test(flavor = "multi_thread")]
async fn supervisor_unreachable_at_the_boot_of_a_joined_host_becomes_ready_when_it_comes() {
    let mut host = Host::ready().await;
    host.kill();
    host.cluster.reach(Reach::Refused);
    let begun = Instant::now();
    host.start();
    host.line(&["watch of pods broke", "pods keep running"]).await;
    host.cluster.reach(Reach::Served);
    until("a renewed status", SOON, || {
        (host.cluster.count(begun, "PATCH /api/v1/nodes/node-1/status") > 0).then_some(())
    })
    .await;
    assert_eq!(tokens_shown(&host, begun), 0, "the stored identity is used, not the token");
}

#[tokio::test(flavor = "multi_thread")]
async fn overloaded_server_is_not_blamed_on_the_token_and_asked_when_it_said() {
    let mut host = Host::new(Events::Told).await;
    host.cluster.fail(CSRS, 429, Some(6), usize::MAX);
    host.start();
    host.line(&["cannot join", "trying again in 6 s"]).await;
    told(&host, &["cannot join", "cannot answer now", "429"]).await;
    host.cluster.heal();
    assert!(!host.log().contains("make a new token"), "{}", host.log());
    host.wait_ready().await;
    let asked: Vec<_> = host.cluster.seen_since(host_epoch());
    let posts: Vec<_> = asked.iter().filter(|s| s.what.starts_with(CSRS) && s.token.is_some()).collect();
    assert!(posts[1].at - posts[0].at >= Duration::from_secs(6), "{posts:?}");
}

/// Before anything happened.
fn host_epoch() -> Instant {
    Instant::now().checked_sub(Duration::from_secs(600)).unwrap_or_else(Instant::now)
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_server_is_asked_again_while_joining() {
    let mut host = Host::new(Events::Told).await;
    // For as long as it takes: of a single failure the status file shows no more once the next try begins, 2 s later.
    host.cluster.fail("GET /api/v1/namespaces/kube-public", 503, None, usize::MAX);
    host.start();
    told(&host, &["cannot join", "cannot answer now", "503"]).await;
    host.cluster.heal();
    host.cluster.fail(CSRS, 500, None, 1);
    host.wait_ready().await;
    host.line(&["cannot join", "cannot answer now", "500"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_near_its_end_is_renewed_and_used_without_a_pod_noticing() {
    let mut host = Host::new(Events::Told).await;
    // Due for renewal as soon as it is there.
    host.cluster.client_life(Life { from: -1000, to: 100 });
    host.start();
    host.bind("stays", serde_json::Value::Null);
    let before = host.wait_running("stays").await;
    host.cluster.client_life(YEAR);
    host.line(&["client certificate renewed, valid until"]).await;
    let renewed = host.renewed();
    until("a lease renewed with the new certificate", SOON, || (host.renewed() != renewed).then_some(()))
        .await;
    let after = host.wait_running("stays").await;
    assert_eq!(before["status"]["containerStatuses"], after["status"]["containerStatuses"]);
    let seen = host.cluster.seen_since(host_epoch());
    let by_token = seen.iter().filter(|seen| seen.token.as_deref() == Some(TOKEN)).count();
    assert!(by_token <= 3, "renewal is by the certificate: {by_token}");
    let by_node = |seen: &&Seen| seen.who.as_deref() == Some("system:node:node-1");
    assert!(seen.iter().filter(by_node).filter(|seen| seen.what.starts_with(CSRS)).count() >= 1);
}

/// Joins, powers off, and lets the certificate expire meanwhile.
async fn expired_while_off() -> Host {
    let mut host = Host::new(Events::Told).await;
    // Not due for renewal while it is on, and over soon.
    host.cluster.client_life(Life { from: 0, to: 5 });
    host.start();
    host.line(&["joined"]).await;
    let over = Instant::now() + Duration::from_secs(6);
    host.kill();
    host.cluster.client_life(YEAR);
    until("the certificate to expire", SOON, || (Instant::now() >= over).then_some(())).await;
    host
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_that_expired_while_the_host_was_off_joins_again_by_the_token() {
    let mut host = expired_while_off().await;
    host.start();
    host.line(&["client certificate of node-1 expired at", "joining again"]).await;
    host.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_that_expired_while_the_host_was_off_without_a_token_says_what_to_do() {
    let mut host = expired_while_off().await;
    host.configure(None);
    host.start();
    told(
        &host,
        &[
            "client certificate of node node-1 expired at",
            "no join section",
            "put server, token and CA pin there",
        ],
    )
    .await;
    host.configure(Some(host.join()));
    host.wait_ready().await;
}
